#!/usr/bin/env bash
# Training on a Cloud TPU slice: a queued resource, one process on each of its hosts, started again after preemption.
#
#   export TPU=helios ZONE=us-east5-a TYPE=v5p-128 SHARE=10.0.0.2:/helios
#   deploy/tpu.sh up --spot          asks for the slice, waits for it, installs this checkout on all hosts
#   deploy/tpu.sh run train.py configs/stage1_init.yaml run=/mnt/helios/runs/stage1-init
#   deploy/tpu.sh logs               follows what the first host prints; `logs 3` the fourth
#   deploy/tpu.sh stop               SIGTERM to all hosts: they save and end; end `run` first, which would start them again
#   deploy/tpu.sh down               deletes the slice
#
# TPU: a name. TYPE: generation and TensorCores (v5p-128: 64 chips on 16 hosts). SHARE: an NFS share, mounted on all hosts
# at /mnt/helios. RUNTIME: the image of the hosts, by default the one for TYPE. The project is gcloud's.
#
# `run` starts python with its arguments on all hosts, and watches. It may be ended and given again at any time: hosts that
# run are left alone. Where the slice was preempted, it is asked for again, as spot if `up` was.
set -euo pipefail
cd "$(dirname "$0")/.."

POLL=${POLL:-60}   # seconds between two looks
RESTARTS=3         # of a run that failed; one that was stopped or preempted starts again without limit
STOPPED="75 130"   # exit codes: saved after SIGTERM; SIGTERM before the first step

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
    [ -n "${!name:-}" ] || fail "$name is not set, as in: export TPU=helios ZONE=us-east5-a TYPE=v5p-128 SHARE=10.0.0.2:/helios"
  done
}

queue() { # queue create|describe|delete ARGUMENT...
  local verb=$1
  shift
  gcloud compute tpus queued-resources "$verb" "$TPU" --zone="$ZONE" "$@"
}

on() { # on WORKER COMMAND, in a shell there
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
}

state() {
  queue describe --format="value(state.state)" 2>/dev/null || echo ABSENT
}

runtime() {
  case $TYPE in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

create() { # create [--spot]
  queue create --node-id="$TPU" --accelerator-type="$TYPE" --runtime-version="${RUNTIME:-$(runtime)}" \
    --labels="helios-spot=$([ "${1:-}" = --spot ] && echo yes || echo no)" "$@"
}

wait_for_slice() {
  local now before=""
  until now=$(state) && [ "$now" = ACTIVE ]; do
    [ "$now" = "$before" ] || say "the slice is $now"
    before=$now
    case $now in FAILED | SUSPENDED | ABSENT) return 1 ;; esac
    sleep "$POLL"
  done
  say "the slice is ACTIVE"
}

# What one host needs. Ubuntu 22.04 has Python 3.10, so uv brings a newer one.
setup() {
  cat <<SETUP
set -e
sudo apt-get -qq update
sudo apt-get -qq install -y nfs-common
sudo mkdir -p /mnt/helios
mountpoint -q /mnt/helios || sudo mount -t nfs -o hard,nconnect=4 $(printf %q "$SHARE") /mnt/helios
sudo chmod a+rwx /mnt/helios
rm -rf helios_jax
mkdir helios_jax
tar -xzf helios_jax.tar.gz -C helios_jax
cd helios_jax
python3 -m pip install -q --user uv
python3 -m uv venv -q --python 3.12 .venv
python3 -m uv pip install -q -p .venv -r requirements.txt "jax[tpu]"
SETUP
}

install() {
  local folder
  folder=$(mktemp -d)
  git archive --format=tar.gz -o "$folder/helios_jax.tar.gz" HEAD
  say "installing on all hosts"
  gcloud compute tpus tpu-vm scp "$folder/helios_jax.tar.gz" "$TPU:" --zone="$ZONE" --worker=all
  rm -r "$folder"
  on all "$(setup)"
}

up() {
  need TPU ZONE TYPE SHARE
  [ $# = 0 ] || [ "$*" = --spot ] || fail "up takes --spot or nothing, got: $*"
  git diff --quiet HEAD || fail "the hosts get the last commit: commit your changes first"
  [ "$(state)" != ABSENT ] || create "$@"
  wait_for_slice || fail "no slice; see: gcloud compute tpus queued-resources describe $TPU --zone=$ZONE; then deploy/tpu.sh down"
  install
}

# A unit of systemd outlives the connection, and gets SIGTERM when its host is shut down.
start() {
  local words
  words=$(printf " %q" "$@")
  say "starting:$words"
  on all "sudo systemctl reset-failed helios 2>/dev/null; sudo systemctl stop helios 2>/dev/null
    sudo systemd-run --quiet --unit=helios --remain-after-exit --uid=\$(id -u) --gid=\$(id -g) \\
      --working-directory=\$HOME/helios_jax --setenv=HOME=\$HOME --setenv=HF_HOME=/mnt/helios/huggingface \\
      --setenv=PYTHONUNBUFFERED=1 --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576 \\
      --property=KillMode=mixed --property=TimeoutStopSec=180 -- \$HOME/helios_jax/.venv/bin/python$words"
}

# One line for each host: running, or ended and its exit code, or absent after a restart of the host.
hosts() {
  on all 'case $(systemctl show helios --value --property=SubState) in
    running) echo helios: running ;;
    exited | failed) echo helios: ended $(systemctl show helios --value --property=ExecMainStatus) ;;
    *) echo helios: absent ;;
  esac'
}

again() { # again --spot|"" ARGUMENT...: a new slice, and the same command on it
  local spot=$1
  shift
  until
    say "the slice is gone; asking for another"
    [ "$(state)" = ABSENT ] || queue delete --force --quiet
    create ${spot:+"$spot"}
    wait_for_slice && install
  do sleep "$POLL"; done
  start "$@"
}

run() {
  need TPU ZONE TYPE SHARE
  [ $# -gt 0 ] || fail "run needs what python runs, as in: run train.py configs/stage1_init.yaml"
  local now found codes code spot="" failures=0
  now=$(state)
  [ "$now" != ABSENT ] || fail "there is no slice $TPU in $ZONE; make it with: deploy/tpu.sh up"
  [ "$(queue describe --format="value(tpu.nodeSpec[0].node.labels.helios-spot)")" != yes ] || spot=--spot
  [ "${1##*/}" != train.py ] || set -- "$@" stopped_code=75
  while true; do
    case $(state) in
      ACTIVE) ;;
      *)
        again "$spot" "$@"
        continue
        ;;
    esac
    found=$(hosts) || found=""
    found=$(grep '^helios: ' <<<"$found") || true
    if [ -z "$found" ]; then # no connection, or a slice that is going: the next look tells
      sleep "$POLL"
      continue
    fi
    if ! grep -q running <<<"$found"; then
      codes=$(sed -n 's/^helios: ended //p' <<<"$found" | sort -n | uniq)
      if [ "$codes" = 0 ] && ! grep -q absent <<<"$found"; then
        say "done"
        return 0
      fi
      for code in $codes; do
        case " 0 $STOPPED " in *" $code "*) continue ;; esac
        failures=$((failures + 1))
        say "ended with code $code; see: deploy/tpu.sh logs"
        [ "$code" != 2 ] && [ "$failures" -le "$RESTARTS" ] || exit "$code"
        break
      done
      start "$@"
    fi
    sleep "$POLL"
  done
}

verb=${1:-}
[ $# = 0 ] || shift
case $verb in
  up | run) "$verb" "$@" ;;
  logs)
    need TPU ZONE
    on "${1:-0}" "journalctl --unit=helios --output=cat --lines=200 --follow"
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
