#!/bin/sh
# Installs the system packages that a step needs and that are missing: `build` (compiler, venv, headers) or `test`
# (NEON under qemu). On Debian and its like, as root or with a sudo that asks for no password; elsewhere, or with
# KVPACK_NO_APT=1, it says what is missing and goes on: the step that needs it says so again.
set -u
python=${PYTHON:-python3}
have() { command -v "$1" >/dev/null 2>&1; }

missing=""
case "${1:-}" in
build)
  have c++ || have g++ || missing="$missing g++"
  # Only Debian's own Python gets Debian's packages.
  if [ "$(command -v "$python" 2>/dev/null)" = /usr/bin/python3 ]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
    "$python" -c 'import os, sysconfig as s; assert os.path.exists(s.get_path("include") + "/Python.h")' 2>/dev/null ||
      missing="$missing python3-dev"
  fi
  ;;
test)
  have qemu-aarch64 || missing="$missing qemu-user"
  have aarch64-linux-gnu-g++ || missing="$missing g++-aarch64-linux-gnu"
  ;;
*)
  echo "usage: $0 build|test" >&2
  exit 2
  ;;
esac
[ -n "$missing" ] || exit 0

give_up() {
  echo "system packages:$missing not installed: $1" >&2
  exit 0
}
[ "${KVPACK_NO_APT:-0}" = 0 ] || give_up "KVPACK_NO_APT is set"
have apt-get || give_up "there is no apt-get here"
as_root=""
if [ "$(id -u)" != 0 ]; then
  have sudo && sudo -n true 2>/dev/null || give_up "neither root nor a sudo without password"
  as_root="sudo -n"
fi
echo "system packages: installing$missing"
log=$(mktemp)
# shellcheck disable=SC2086 # both are lists
if ! { $as_root apt-get update && DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y --no-install-recommends $missing; } \
  >"$log" 2>&1 </dev/null; then
  tail -n 5 "$log" >&2
  rm -f "$log"
  give_up "apt-get failed"
fi
rm -f "$log"
