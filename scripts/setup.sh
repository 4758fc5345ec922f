#!/usr/bin/env bash
# Make .venv hold this checkout and its dependencies at the versions of constraints.txt.
#
#   scripts/setup.sh        what `elision` needs to run
#   scripts/setup.sh dev    what tests, lint, types and documentation need too
#
# A marker inside .venv, written last, says what is installed and for which directory; a call that finds it up to date
# does nothing. Where it is missing (first call, interrupted call) or names another directory (checkout moved), the
# environment is built from scratch: nothing half-installed outlives an interruption. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:-base}
marker=.venv/.installed
versions=$(cat pyproject.toml constraints.txt | cksum | tr ' ' -)

# Two commands started at once must not install over each other: the second waits, then finds the work done.
if command -v flock >/dev/null; then
  exec 9<scripts/setup.sh
  flock 9
fi

had_versions= had= place=
if [ -f "$marker" ] && .venv/bin/python -c "import elision" 2>/dev/null; then
  read -r had_versions had place <"$marker"
fi
if [ "$had" = dev ]; then what=dev; fi # it has all that is in base, and an update keeps the tools
if [ "$had_versions $had $place" = "$versions $what $PWD" ]; then exit 0; fi

usable() { "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }

if [ "$place" != "$PWD" ]; then
  chosen=
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
    if usable "$candidate"; then chosen=$candidate && break; fi
  done
  if [ -z "$chosen" ]; then
    found=${PYTHON:-$(python3 --version 2>/dev/null || echo "no Python")}
    echo "error: found $found, but elision needs Python 3.11, 3.12 or 3.13 with its venv module:" \
      "install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2
    exit 1
  fi
  echo "Creating .venv with $("$chosen" --version)"
  rm -rf .venv
  "$chosen" -m venv .venv
fi
rm -f "$marker"

echo "Installing into .venv at the versions of constraints.txt (a few minutes the first time)"
install=(.venv/bin/python -m pip install --disable-pip-version-check --retries 10 --constraint constraints.txt)
[ -t 1 ] || install+=(--quiet) # a person sees the downloads move, a log only what went wrong
# The build tools, pinned like the rest; setuptools because dependencies that publish no wheel are built with it, and
# the one that Python 3.11 puts into an environment cannot make wheels, later ones put in none.
"${install[@]}" hatchling editables setuptools
if [ "$what" = dev ]; then extras="[dev,docs,eval,qlora,torchao]"; else extras=; fi
"${install[@]}" --no-build-isolation --editable ".$extras"
echo "$versions $what $PWD" >"$marker"
