#!/usr/bin/env bash
# From a clone to the tables, on any bash since 3.2. `./reproduce.sh --help` says how.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=${PACL_VENV:-$here/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac

usage() {
  cat <<'EOF'
usage: ./reproduce.sh [PROFILE] [key=value ...] [--data ROOT] [--dry-run] [--runs FOLDER]
                             run a profile (demo) into runs/PROFILE; what is current is skipped
       ./reproduce.sh tumemo --data ROOT --dry-run
                             the paper's experiment, on four GPUs: run nothing, list what is missing
                             and where to get it (exit code 2), and how long it takes; then without --dry-run
       ./reproduce.sh PROFILE --help
                             every profile, and every key with its meaning
       ./reproduce.sh setup  only make the environment (the others do so themselves)
       ./reproduce.sh test   all checks

The environment is made once, in .venv beside this file: about 7 GB, 7 minutes. These variables change that:
  PACL_ENV=active            install into the environment that is active (conda, venv) instead
  PACL_VENV=FOLDER           make it there
  PYTHON=python3.12          make it with this Python (3.11 or later)
EOF
}

stop() { printf '%s\n' "$@" >&2; exit 1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {  # CANDIDATE...: sets $python to the first that is new enough
  local found='' candidate
  if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; fi
  for candidate in "$@"; do
    if ! command -v "$candidate" >/dev/null; then continue; fi
    python=$(command -v "$candidate")
    if is_new_enough "$python"; then return; fi
    found="$found $candidate is $("$python" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo broken);"
  done
  if [ -z "$found" ]; then found=" there is no $1;"; fi
  stop "Python 3.11 or later is needed, and${found%;}. Install one (python.org), or name it: PYTHON=/path/to/python3.11 ./reproduce.sh"
}

free_gb() { df -Pk "$1" | awk 'NR == 2 { print int($4 / 1000000) }'; }

install() {  # one call of pip, its last line shown while it works
  local log=$prefix/pacl-setup.log pid code=0 start=$SECONDS
  "$py" -m pip install --no-input --disable-pip-version-check --progress-bar off \
    -c "$here/constraints.txt" -e "$here[reproduce,onnx,dev]" >"$log" 2>&1 &
  pid=$!
  trap 'kill $pid 2>/dev/null; echo; exit 130' INT TERM  # what runs behind & does not hear Ctrl-C
  while kill -0 $pid 2>/dev/null; do
    if [ -t 2 ]; then printf '\rsetting up, %d s: %-60s' $((SECONDS - start)) "$(tail -n 1 "$log" | cut -c 1-60)" >&2; fi
    sleep 0.2
  done
  wait $pid || code=$?
  trap - INT TERM
  if [ -t 2 ]; then printf '\r%-90s\r' '' >&2; fi
  if [ $code -eq 0 ]; then echo "set up in $((SECONDS - start)) s"; return; fi
  if grep -qi 'no space left\|errno 28\|quota exceeded' "$log"; then
    stop "The disk is full: the environment needs about 7 GB below $prefix." "Free some space and run again, or put it elsewhere: PACL_VENV=/other/disk/pacl ./reproduce.sh"
  elif grep -qi 'NewConnectionError\|NameResolutionError\|name resolution\|ConnectTimeout\|timed out\|connection refused\|connection broken\|ProxyError\|SSLError\|network is unreachable' "$log"; then
    stop "pip cannot reach its package index. Check the network, a proxy (HTTPS_PROXY) or pip's own settings (pip config list) and run again:" "what was downloaded is kept. All that pip said: $log"
  fi
  tail -n 5 "$log" >&2
  stop "pip could not install the packages of pyproject.toml. All that it said: $log"
}

setup() {  # sets $py; does nothing where what pyproject.toml and constraints.txt ask for is installed
  local want
  if [ "${PACL_ENV:-}" = active ]; then
    find_python python python3
    py=$python prefix=$("$python" -c 'import sys; print(sys.prefix)')
  else
    py=$venv/bin/python prefix=$venv
  fi
  want="$(cat "$here/pyproject.toml" "$here/constraints.txt" | cksum) $here"
  if [ "$(cat "$prefix/.pacl" 2>/dev/null)" != "$want" ] || ! is_new_enough "$py"; then
    mkdir -p "$prefix" || stop "The environment needs a folder that you may write: PACL_VENV=/other/folder ./reproduce.sh"
    if ! is_new_enough "$py"; then
      find_python python3 python python3.14 python3.13 python3.12 python3.11
      if [ "$(free_gb "$prefix")" -lt 8 ]; then
        stop "The disk is nearly full: setting up needs 8 GB, and $prefix has $(free_gb "$prefix") GB." "Free some space, or put it elsewhere: PACL_VENV=/other/disk/pacl ./reproduce.sh"
      fi
      echo "Making an environment with $python in $prefix: about 7 minutes, once."
      "$python" -m venv --clear "$prefix" || stop "$python could not make an environment. On Debian and Ubuntu: apt install python3-venv"
    fi
    rm -f "$prefix/.pacl"
    install
    echo "$want" >"$prefix/.pacl"
  fi
  PATH=$(dirname "$py"):$PATH
}

check() {  # NAME COMMAND...: goes on after a failure
  local name=$1 start=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  if "$@"; then echo "-- $name: fine, $((SECONDS - start)) s"; else failed="$failed $name;"; fi
}

changes_nothing() {  # COMMAND: in a copy, so that a failure repairs nothing unseen
  rm -rf "$scratch/copy"
  mkdir "$scratch/copy"
  cp -R nbs pacl settings.ini pyproject.toml "$scratch/copy"
  (cd "$scratch/copy" && "$1") && diff -r -x __pycache__ -x .ipynb_checkpoints nbs "$scratch/copy/nbs" &&
    diff -r -x __pycache__ pacl "$scratch/copy/pacl"
}

run_tests() {
  failed=''
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/pacl-test.XXXXXX")
  trap 'rm -rf "$scratch"' EXIT
  trap 'exit 130' INT TERM
  cd "$here"
  check 'pip check' python -m pip check
  check 'ruff' ruff check .
  check 'nbdev_export changes nothing' changes_nothing nbdev_export
  check 'nbdev_clean changes nothing' changes_nothing nbdev_clean
  check 'nbdev_test' nbdev_test --n_workers 2
  check 'smoke profile' python -m pacl.app.pipeline smoke --runs "$scratch/runs"
  printf '\n== pytest\n'
  python -m pytest || failed="$failed pytest;"  # last: its closing line ends what is green
  if [ -n "$failed" ]; then stop "FAILED:${failed%;}"; fi
}

export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false PYTHONHASHSEED=0 PYTHONUTF8=1
case "${1-demo}" in demo | smoke | test | *=*) export HF_HUB_OFFLINE=1 ;; esac  # these need no network, and so show it

case "${1-}" in
  -h | --help) usage ;;
  setup) setup; echo "Ready: $py" ;;
  test) setup; run_tests ;;
  *) setup; exec "$py" -m pacl.app.pipeline ${1+"$@"} ;;
esac
