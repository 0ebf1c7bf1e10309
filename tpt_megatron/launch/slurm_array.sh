# Of arrays: each task does its shard, again when it fails, and goes back to the queue when it was stopped.
task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
start=${SLURM_RESTART_COUNT:-0} # how often the task went back to the queue

# Slurm signals this shell before the time limit; the work ends in good order, and the task goes back to the queue.
child=
hand_on() {
  signals=$((signals + 1))
  if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap hand_on TERM

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
