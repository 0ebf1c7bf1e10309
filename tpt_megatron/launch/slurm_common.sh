# What follows is the same for every script; what it is given stands above.
set -u
signals=0 # how many have come: traps count them
say() { printf 'tpt launch: %s\n' "$*" >&2; }

# A trap runs only when the command in the foreground has ended; so commands run behind, and are waited for again after each signal.
wait_for() {
  local before code
  while true; do
    before=$signals
    wait "$1"
    code=$?
    [ "$signals" != "$before" ] || return "$code"
  done
}

