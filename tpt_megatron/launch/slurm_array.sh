# What follows is the same for every array; what it is given stands above.
set -u
task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
start=${SLURM_RESTART_COUNT:-0} # how often the task went back to the queue
say() { printf 'tpt launch: %s\n' "$*" >&2; }

# Slurm signals this shell before the time limit; the work ends in good order, and the task goes back to the queue.
child=
signals=0
hand_on() {
  signals=$((signals + 1))
  if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap hand_on TERM
wait_for() {
  local before code
  while true; do
    before=$signals
    wait "$1"
    code=$?
    [ "$signals" != "$before" ] || return "$code"
  done
}

failures=0
while true; do
  "${command[@]}" "shard=$SLURM_ARRAY_TASK_ID/$shards" &
  child=$!
  wait_for "$child"
  code=$?
  child=
  case $code in
    0 | 2) exit "$code" ;;
    3)
      if [ "$start" -ge "$max_requeues" ]; then
        say "stopped, and max_requeues=$max_requeues are used up: submit it again to continue"
        exit 3
      fi
      say "stopped in good order; the task goes back to the queue (requeue $((start + 1)) of at most $max_requeues)"
      scontrol requeue "$task" || say "it could not be requeued; submit it again to continue"
      exit 3
      ;;
  esac
  if [ "$failures" -ge "$max_restarts" ] || [ "$signals" != 0 ]; then
    say "failed (exit code $code) after $failures of max_restarts=$max_restarts"
    exit "$code"
  fi
  pause=$((backoff_s << failures))
  pause=$((pause > max_backoff_s ? max_backoff_s : pause))
  failures=$((failures + 1))
  say "failed (exit code $code); start $failures of max_restarts=$max_restarts in $pause s"
  sleep "$pause" &
  child=$!
  wait_for "$child"
  child=
  [ "$signals" = 0 ] || exit "$code"
done
