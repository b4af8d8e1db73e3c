# shellcheck shell=bash
# Sourced by the launch scripts. Creates or reuses .venv in the checkout, or the environment that
# STOA_VENV names; changes to the root of the checkout and sets PYTHON to the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV="${STOA_VENV:-$PWD/.venv}"
PYTHON="$VENV/bin/python"

stop() {
  echo "error: $*" >&2
  exit 2
}

setup() { # setup REQUIREMENTS_FILE…
  local stamp wanted found=""
  stamp="$VENV/.installed"
  # After a change in any of these files, install again.
  wanted="$(cat requirements*.txt pyproject.toml | cksum) $*"
  if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  if [ ! -x "$PYTHON" ]; then
    for candidate in python3.11 python3.12 python3; do
      if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
        found="$candidate"
        break
      fi
    done
    [ -n "$found" ] || stop "no Python 3.11 or 3.12 on the PATH; install python3.11 and run this again"
    "$found" -m venv "$VENV" >/dev/null 2>&1 ||
      stop "'$found -m venv' failed; install its venv module (on Debian: apt install ${found}-venv), remove $VENV and run this again"
  fi
  echo "Installing into $VENV (once, about two minutes) …"
  local arguments=()
  for file in "$@"; do arguments+=(-r "$file"); done
  "$PYTHON" -m pip install --quiet --disable-pip-version-check "${arguments[@]}" ||
    stop "pip could not install $*; see its message above"
  echo "$wanted" >"$stamp"
}
