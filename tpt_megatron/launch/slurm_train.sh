# Of training: one agent a node, again when ranks fail, and back to the queue when they were stopped.
job=$SLURM_JOB_ID
job_logs=$logs/$job
start=${SLURM_RESTART_COUNT:-0} # how often the job went back to the queue
mkdir -p "$job_logs" || exit 1

# SIGTERM to this shell alone, `scancel --batch --signal=TERM JOB`, is how a run is asked to end for good: its ranks save, and the job does not go
# back to the queue. Where Slurm ends the whole job by itself (scancel, a preemption without grace), it comes too, and ranks have what is left.
asked_to_end=no
step_runs=no
end_for_good() {
  signals=$((signals + 1))
  [ "$asked_to_end" = no ] || return 0
  asked_to_end=yes
  say "asked to end: ranks save, then the job ends"
  if [ "$step_runs" = yes ]; then scancel --signal=TERM "$job" 2>/dev/null; fi
}
trap end_for_good TERM

requeue() {
  if [ "$asked_to_end" = yes ]; then
    exit "$2"
  fi
  if [ "$start" -ge "$max_requeues" ]; then
    say "$1; max_requeues=$max_requeues are used up: submit it again to continue"
    exit "$2"
  fi
  say "$1; the job goes back to the queue (requeue $((start + 1)) of at most $max_requeues)"
  # From here on Slurm ends this script, too, when it likes.
  trap '' TERM
  if scontrol requeue "$job"; then
    if [ -s "$job_logs/bad_nodes" ]; then
      scontrol update JobId="$job" ExcNodeList="$(sort -u "$job_logs/bad_nodes" | paste -s -d , -)"
    fi
  else
    say "the job could not be requeued; submit it again to continue"
  fi
  exit "$2"
}

# Every node runs the check for itself; one that says nothing within two minutes is bad, too.
check_nodes() {
  local folder=$1 node bad=no
  mkdir -p "$folder"
  # shellcheck disable=SC2016 # the node expands it
  timeout 150 srun "${srun_nodes[@]}" --kill-on-bad-exit=0 --wait=0 bash -c '
    if said=$(timeout 120 bash -c "$1" 2>&1); then echo ok; else echo "${said##*$'"'\\n'"'}"; fi >"$2/$SLURMD_NODENAME"
  ' health "$health_check" "$folder"
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    if [ "$(cat "$folder/$node" 2>/dev/null)" != ok ]; then
      say "bad node $node: $(cat "$folder/$node" 2>/dev/null || echo "it did not answer")"
      # Those that the job excludes already stay excluded.
      [ -e "$job_logs/bad_nodes" ] ||
        scontrol --oneliner show job "$job" | sed -n 's/.* ExcNodeList=\([^ (]\+\) .*/\1/p' >"$job_logs/bad_nodes"
      echo "$node" >>"$job_logs/bad_nodes"
      bad=yes
    fi
  done
  [ "$bad" = no ] || requeue "excluding bad nodes" 1
}

# Slurm reaches the first node, which this script runs on, by this name; so do the others.
host=$(scontrol --oneliner show node "$SLURMD_NODENAME" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
host=${host:-$(hostname)}
port=$((20000 + job % 10000))
attempt=1
failures=0
while true; do
  while ! mkdir "$job_logs/attempt_$attempt" 2>/dev/null; do attempt=$((attempt + 1)); done
  attempt_logs=$job_logs/attempt_$attempt
  check_nodes "$attempt_logs/health"
  [ "$asked_to_end" = no ] || exit 3
  say "attempt $attempt on $SLURM_JOB_NODELIST: $attempt_logs/rank_*.log"
  step_runs=yes
  srun "${srun_nodes[@]}" --kill-on-bad-exit=0 --wait="$stop_s" "${srun_options[@]}" \
    "${command[@]}" --logs="$attempt_logs" --rendezvous="$host:$port" --id="$job-$attempt" --node-variable=SLURM_NODEID -- "${arguments[@]}" &
  wait_for $!
  code=$?
  step_runs=no
  case $code in
    0) say "done" && exit 0 ;;
    2) say "ranks refused the config: $attempt_logs" && exit 2 ;;
    3) requeue "ranks stopped after saving" 3 ;;
  esac
  [ "$asked_to_end" = no ] || exit "$code"
  if [ "$failures" -ge "$max_restarts" ]; then
    say "ranks failed (exit code $code) and max_restarts=$max_restarts are used up: $attempt_logs"
    exit "$code"
  fi
  pause=$((backoff_s << failures))
  pause=$((pause > max_backoff_s ? max_backoff_s : pause))
  failures=$((failures + 1))
  say "ranks failed (exit code $code); start $failures of max_restarts=$max_restarts in $pause s"
  sleep "$pause" &
  wait_for $!
  [ "$asked_to_end" = no ] || exit "$code"
done
