# shellcheck shell=bash
# Shared by the scripts of this folder: starts the ranks of a Slurm job and queues the job again.
# shellcheck source=launch/ranks.sh
source "$(dirname "${BASH_SOURCE[0]}")/../ranks.sh"

# SLURM_JOB_ID of a task may be its array's too, and then means all tasks.
JOB=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

# What starts the ranks. srun does not inherit --cpus-per-task since Slurm 22.05.
case $LAUNCHER in
  srun)
    START=(srun --mpi=pmix --kill-on-bad-exit=1 --cpu-bind=none)
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then START+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
    ;;
  mpirun) START=("${MPIRUN[@]}" -np "$SLURM_NTASKS") ;;
  *) say "LAUNCHER is srun or mpirun, not $LAUNCHER"; exit 78 ;;
esac

# Octet drains in time when it knows the job's end; older Slurm does not say it in the environment.
if [[ -z ${SLURM_JOB_END_TIME:-} ]] &&
  end=$(date -d "$(squeue --noheader --job "$JOB" --format %e)" +%s 2>/dev/null); then
  export SLURM_JOB_END_TIME=$end
fi

# Ends the script: the job waits in the queue again, with the same number, and appends to the same log.
queue_again() {
  say "queued again, after ${SLURM_RESTART_COUNT:-0} restarts"
  scontrol requeue "$JOB" || say "Slurm does not queue this job again: submit it once more, it goes on where it was"
  exit "$COME_BACK"
}

# octet batch from INPUT to OUTPUT, over as many incarnations of the job as it takes. Ends the script.
run_batch() {  # OUTPUT OPTION...
  local output=$1 status=0
  shift
  if ((${SLURM_RESTART_COUNT:-0} == 0)); then forget_starts "$output"; fi
  run_ranks "${START[@]}" "$OCTET" batch --model "$MODEL" --input "$INPUT" --output "$output" \
    --drain-seconds "$DRAIN_SECONDS" "$@" || status=$?
  if ((status == 0)) && [[ ! -e $output ]]; then
    say "$LAUNCHER ended well, but there is no $output: the ranks did not start"  # srun does that
    status=$COME_BACK
  fi
  if ((status == 3)); then
    say "done, and some lines have errors"
    exit 0  # for the jobs that depend on this one
  fi
  # After SIGTERM the job is cancelled, or Slurm itself queues it again.
  if asks_to_come_back "$status" && [[ $TOLD != TERM ]] && count_start "$output"; then queue_again; fi
  exit "$status"
}
