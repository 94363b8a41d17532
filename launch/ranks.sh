# shellcheck shell=bash disable=SC2034  # what is set here is used by the scripts that read this
# Shared by launch/slurm and launch/mpirun: runs the ranks of a job, hands signals on to them, counts fruitless starts.
# Invariant: a signal to the script reaches every rank as SIGUSR1, and what counts is the exit status of the ranks.

readonly COME_BACK=75  # octet's exit status for "start me again", EX_TEMPFAIL
readonly MAX_IDLE_STARTS=3
PID_OF_RANKS=          # of srun or mpirun
TOLD=                  # the last signal that this script got
INTERRUPTED=           # by a signal, since the last look

# Batch systems send SIGTERM to every process of a job. mpirun would kill its ranks two seconds later and lose what they
# say until then; a signal that is blocked for it is not for its ranks.
MPIRUN=(env --block-signal=TERM mpirun --bind-to none)

say() { printf '%s %s\n' "$(date +%T)" "$*" >&2; }

# srun and mpirun hand SIGUSR1 on to every rank.
hand_on() {  # SIGNAL
  TOLD=$1
  INTERRUPTED=1
  say "SIG$1: the ranks drain"
  if [[ -n $PID_OF_RANKS ]]; then kill -USR1 "$PID_OF_RANKS" 2>/dev/null || true; fi
}
for signal in USR1 TERM INT; do
  # shellcheck disable=SC2064  # this signal, not the last one
  trap "hand_on $signal" "$signal"
done

# Runs COMMAND, which is srun or mpirun with what they start, and returns its exit status.
run_ranks() {  # COMMAND...
  local status
  if [[ -n $TOLD ]]; then return "$COME_BACK"; fi
  # In a process group of its own, so that Ctrl-C reaches the ranks through hand_on only.
  set -m
  "$@" </dev/null &
  PID_OF_RANKS=$!
  set +m
  # A signal ends wait too.
  INTERRUPTED=1
  while [[ -n $INTERRUPTED ]]; do
    INTERRUPTED=
    status=0
    wait "$PID_OF_RANKS" || status=$?
  done
  PID_OF_RANKS=
  return "$status"
}

# ---- octet batch -----------------------------------------------------------------------------------------------------

# Whether the ranks ask to be started again. Also when one was killed, by the kernel for its memory for example.
asks_to_come_back() {  # STATUS
  (($1 == COME_BACK || $1 > 128))
}

lines_done() {  # OUTPUT
  sed -n 's/.*"lines_done": *\([0-9]*\).*/\1/p' "$1.octet/status.json" 2>/dev/null | grep . || echo 0
}

# Counts in a file beside octet's own the starts in a row that brought no line; fails when there were too many of them.
count_start() {  # OUTPUT
  local file=$1.octet/starts before=-1 idle=0 now
  now=$(lines_done "$1")
  if [[ -f $file ]]; then read -r before idle <"$file"; fi
  if ((now > before)); then idle=0; else idle=$((idle + 1)); fi
  mkdir -p "$1.octet"
  echo "$now $idle" >"$file"
  ((idle < MAX_IDLE_STARTS)) || { say "gives up: $idle starts brought no line more than these $now"; return 1; }
}

forget_starts() {  # OUTPUT
  rm -f "$1.octet/starts"
}
