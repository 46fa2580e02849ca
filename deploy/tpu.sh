#!/usr/bin/env bash
# Training on a Cloud TPU slice: a queued resource, one process on each of its hosts, started again after preemption.
#
#   export TPU=helios ZONE=us-east5-a TYPE=v5p-128 SHARE=10.0.0.2:/helios
#   deploy/tpu.sh up --spot          asks for the slice, waits for it, installs this checkout on all hosts
#   deploy/tpu.sh run --spot train.py configs/stage1_init.yaml run=/mnt/helios/runs/stage1-init
#   deploy/tpu.sh logs               follows what the first host prints; `logs 3` the fourth
#   deploy/tpu.sh stop               SIGTERM to all hosts: they save and end. End `run` first, or it starts them again
#   deploy/tpu.sh down               deletes the slice
#
# TPU: a name. TYPE: generation and TensorCores (v5p-128: 64 chips on 16 hosts). SHARE: an NFS share, mounted on all
# hosts at /mnt/helios. RUNTIME: the image of the hosts, by default the one for TYPE. JAX_COMPILATION_CACHE_DIR: the
# folder of compiled programs, by default /mnt/helios/xla. The project is gcloud's. Without --spot the slice is not
# preempted, and costs more.
#
# `run` starts python with its arguments on all hosts, and watches. It may be ended and given again at any time: a run
# that goes on is left alone. A slice that was preempted is asked for again; it gets the commit checked out here then.
set -euo pipefail
cd "$(dirname "$0")/.."

POLL=${POLL:-60} # seconds between two looks
# Starts after a failure, until a run has lasted so many seconds. One that was stopped, or lost a host, starts again
# without limit.
RESTARTS=3
LASTED=${LASTED:-3600}
# Exit codes: saved after SIGTERM; another host is gone; SIGTERM before the first step, and of a program that saves
# nothing.
STOPPED="75 76 130 15"
EXAMPLE="TPU=helios ZONE=us-east5-a TYPE=v5p-128 SHARE=10.0.0.2:/helios"
spot=""

fail() {
  echo "tpu.sh: $*" >&2
  exit 2
}

say() {
  echo "tpu.sh: $(date +%H:%M:%S) $*" >&2
}

need() {
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || fail "$name is not set; as in: export $EXAMPLE"
  done
}

queue() { # queue create|describe|delete ARGUMENT...
  local verb=$1
  shift
  gcloud compute tpus queued-resources "$verb" "$TPU" --zone="$ZONE" "$@"
}

on() { # on WORKER COMMAND, which a shell there runs
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
}

# The state of the queued resource; ABSENT: there is none; UNKNOWN: no answer.
state() {
  local answer
  if answer=$(queue describe --format="value(state.state)" 2>&1); then
    tail -n 1 <<<"$answer"
  elif grep -qi "not.found" <<<"$answer"; then
    echo ABSENT
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}

create() {
  local runtime
  case $TYPE in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    *) runtime=tpu-ubuntu2204-base ;;
  esac
  queue create --node-id="$TPU" --accelerator-type="$TYPE" --runtime-version="${RUNTIME:-$runtime}" ${spot:+"$spot"}
}

# Commands of one host that make it ready. A new host updates itself, and holds apt's lock then. Ubuntu 22.04 has Python
# 3.10, so uv brings a newer one.
setup() {
  cat <<SETUP
set -e
sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y nfs-common
sudo mkdir -p /mnt/helios
mountpoint -q /mnt/helios || sudo mount -t nfs -o hard $(printf %q "$SHARE") /mnt/helios
sudo chmod a+rwx /mnt/helios
rm -rf helios_jax
mkdir helios_jax
tar -xzf helios_jax.tar.gz -C helios_jax
cd helios_jax
python3 -m pip install -q --user uv
python3 -m uv venv -q --python 3.12 .venv
python3 -m uv pip install -q -p .venv -r requirements.txt "jax[tpu]"
touch .ready
SETUP
}

install() {
  local folder
  folder=$(mktemp -d)
  say "installing on all hosts"
  git archive --format=tar.gz -o "$folder/helios_jax.tar.gz" HEAD &&
    gcloud compute tpus tpu-vm scp "$folder/helios_jax.tar.gz" "$TPU:" --zone="$ZONE" --worker=all &&
    on all "$(setup)"
}

up() {
  need TPU ZONE TYPE SHARE
  [ $# = 0 ] || fail "up takes --spot or nothing, got: $*"
  git diff --quiet HEAD || fail "the hosts get the last commit: commit your changes first"
  local now found before=""
  while now=$(state) && [ "$now" != ACTIVE ]; do
    [ "$now" = "$before" ] || say "the slice is $now"
    case $now in
      ABSENT) create ;;
      FAILED | SUSPENDED) fail "the request is $now; delete it with deploy/tpu.sh down, then run deploy/tpu.sh up again" ;;
      *) sleep "$POLL" ;;
    esac
    before=$now
  done
  say "the slice is ACTIVE"
  if [ -z "$before" ]; then # installing takes away the files that a run reads
    found=$(look) || fail "its hosts do not answer; run deploy/tpu.sh up once more"
    ! grep -q running <<<"$found" || fail "a run goes on there; end it with deploy/tpu.sh stop first"
  fi
  install
}

# A unit of systemd outlives the connection, and gets SIGTERM when its host is shut down, before network and share go.
start() {
  local words
  words=$(printf " %q" "$@")
  say "starting: python$words"
  on all "set -e
cd helios_jax
cat > run.sh <<'RUN'
exec .venv/bin/python$words
RUN
sudo systemctl stop helios 2>/dev/null || true
sudo systemctl reset-failed helios 2>/dev/null || true
sudo systemd-run --quiet --unit=helios --remain-after-exit --uid=\$(id -u) --gid=\$(id -g) --working-directory=\$PWD \\
  --setenv=HOME=\$HOME --setenv=HF_HOME=/mnt/helios/huggingface --setenv=PYTHONUNBUFFERED=1 \\
  --setenv=JAX_COMPILATION_CACHE_DIR=$(printf %q "${JAX_COMPILATION_CACHE_DIR:-/mnt/helios/xla}") \\
  --property='After=network-online.target remote-fs.target' --property=LimitMEMLOCK=infinity \\
  --property=LimitNOFILE=1048576 --property=KillMode=mixed --property=TimeoutStopSec=180 -- bash run.sh"
}

# One line for each host: running, also while it saves and ends; ended and the exit code; ready; absent where it is not
# installed.
look() {
  on all 'now=$(systemctl show helios --value --property=SubState)
case $now in
  running | start* | stop* | final*) echo helios: running ;;
  *)
    if ! [ -e helios_jax/.ready ] || ! mountpoint -q /mnt/helios; then
      echo helios: absent
    else
      case $now in
        exited | failed) echo helios: ended $(systemctl show helios --value --property=ExecMainStatus) ;;
        *) echo helios: ready ;;
      esac
    fi
    ;;
esac'
}

run() {
  need TPU ZONE TYPE SHARE
  [ $# -gt 0 ] || fail "run needs what python runs, as in: run train.py configs/stage1_init.yaml"
  local now found code failures=0 begun=$SECONDS
  [ "$(state)" != ABSENT ] || fail "there is no slice $TPU in $ZONE; make it with: deploy/tpu.sh up"
  for (( ; ; )); do
    now=$(state)
    case $now in
      ACTIVE) ;;
      ABSENT | SUSPENDED | FAILED)
        say "the slice is $now; asking for another"
        [ "$now" = ABSENT ] || queue delete --force --quiet || true
        create || true # the next look tells
        sleep "$POLL"
        continue
        ;;
      *) # in the queue, being made, being taken away, or no answer
        say "the slice is $now"
        sleep "$POLL"
        continue
        ;;
    esac
    if ! found=$(look); then # a host that does not answer may be on its way out: the next state tells
      sleep "$POLL"
      continue
    fi
    found=$(grep "^helios: " <<<"$found" | sort -u)
    if ! grep -q running <<<"$found"; then
      if [ "$found" = "helios: ended 0" ]; then
        say "done; the slice costs until: deploy/tpu.sh down"
        return 0
      fi
      [ $((SECONDS - begun)) -lt "$LASTED" ] || failures=0
      for code in $(sed -n "s/^helios: ended //p" <<<"$found"); do
        case " 0 $STOPPED " in *" $code "*) continue ;; esac
        failures=$((failures + 1))
        say "ended with code $code; see deploy/tpu.sh logs"
        if [ "$code" = 2 ] || [ "$failures" -gt "$RESTARTS" ]; then
          say "not started again; the slice costs until: deploy/tpu.sh down"
          return "$code"
        fi
        break
      done
      if ! grep -q absent <<<"$found" || install; then
        begun=$SECONDS
        start "$@" || true # the next look tells
      fi
    fi
    sleep "$POLL"
  done
}

verb=${1:-}
[ $# = 0 ] || shift
if [ "${1:-}" = --spot ]; then
  spot=--spot
  shift
fi
case $verb in
  up | run) "$verb" "$@" ;;
  logs)
    need TPU ZONE
    on "${1:-0}" "sudo journalctl --unit=helios --output=cat --lines=200 --follow"
    ;;
  stop)
    need TPU ZONE
    on all "sudo systemctl stop helios"
    ;;
  down)
    need TPU ZONE
    queue delete --force --quiet
    ;;
  *) fail "one of up, run, logs, stop and down is needed, got: ${verb:-nothing}" ;;
esac
