#!/usr/bin/env bash
# Stands in for gcloud, srun and the commands of a TPU host, by the name it is called by: a slice is the folder $FAKE.
# Every call is a line of $FAKE/calls: its words, separated by tabs. Answers come from files there: `states` (of the
# queued resource, one for each look), `codes` (exit codes of python, one for each start) and `code` (of srun).
name=${0##*/}
(IFS=$'\t' && printf '%s\n' "$name"$'\t'"${*//$'\n'/;}") >>"$FAKE/calls"

take() { # the next line of a file; its last line stays
  head -n 1 "$FAKE/$1"
  if [ "$(wc -l <"$FAKE/$1")" -gt 1 ]; then sed -i 1d "$FAKE/$1"; fi
}

case $name in
  gcloud)
    case "$*" in
      *"queued-resources describe"*)
        state=$(take states)
        case $state in
          ABSENT) echo "ERROR: NOT_FOUND: Resource was not found" >&2 && exit 1 ;;
          UNKNOWN) echo "ERROR: no connection" >&2 && exit 1 ;;
          *) echo "$state" ;;
        esac
        ;;
      *"queued-resources create"*) rm -rf "$FAKE/host" && mkdir "$FAKE/host" ;;
      *" scp "*) cp "$5" "$FAKE/host/" ;;
      *" ssh "*)
        for word in "$@"; do command=${word#--command=}; done
        cd "$FAKE/host" && HOME=$FAKE/host exec bash -c "$command"
        ;;
    esac
    ;;
  git)
    [ "$1" = diff ] && exit "$(cat "$FAKE/dirty")"
    mkdir -p "$FAKE/tree" && : >"$FAKE/tree/requirements.txt" && tar -czf "$4" -C "$FAKE/tree" .
    ;;
  sudo)
    case $1 in
      systemctl | systemd-run | journalctl) exec "$@" ;;
      mount) : >"$FAKE/host/.mounted" ;;
    esac
    ;;
  mountpoint) [ -e "$FAKE/host/.mounted" ] ;;
  python3)
    if [ "$2 $3" = "uv venv" ]; then
      mkdir -p .venv/bin && ln -s "$0" .venv/bin/python
    fi
    ;;
  systemd-run)
    while [ "$1" != -- ]; do shift; done
    shift
    "$@"
    echo $? >"$FAKE/host/.ended"
    ;;
  systemctl)
    case "$*" in
      *SubState) if [ -e "$FAKE/host/.running" ]; then echo running; elif [ -e "$FAKE/host/.ended" ]; then echo exited; else echo dead; fi ;;
      *ExecMainStatus) cat "$FAKE/host/.ended" ;;
    esac
    ;;
  python)
    printf '%s\0' "$@" >"$FAKE/arguments"
    exit "$(take codes)"
    ;;
  srun)
    printf '%s\0' "$@" >"$FAKE/arguments"
    printf '%s' "$JAX_LOCAL_DEVICE_IDS" >"$FAKE/devices"
    printf '%s' "$JAX_COMPILATION_CACHE_DIR" >"$FAKE/compiled"
    exit "$(cat "$FAKE/code")"
    ;;
esac
