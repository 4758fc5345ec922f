#!/usr/bin/env bash
# Make .venv-vllm hold vLLM for CPUs and this checkout, at the versions of constraints-vllm.txt: about 3.5 GB.
#
# Apart from .venv because vLLM pins versions of its own. Our package is installed without its dependencies: the plugin
# must need no more than what vLLM brings. A marker, written last, says what is installed and for which directory.
set -euo pipefail
cd "$(dirname "$0")/.."

marker=.venv-vllm/.installed
wanted="$(cat pyproject.toml constraints-vllm.txt | cksum | tr ' ' -) $PWD"
if command -v flock >/dev/null; then
  exec 9<scripts/setup_vllm.sh
  flock 9
fi
if [ -f "$marker" ] && [ "$(cat "$marker")" = "$wanted" ]; then exit 0; fi

python=${PYTHON:-python3}
if ! "$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
  echo "error: $python is not Python 3.11, 3.12 or 3.13 with its venv module: make PYTHON=/path/to/python3.11 ..." >&2
  exit 1
fi
echo "Installing vLLM into .venv-vllm at the versions of constraints-vllm.txt (some minutes the first time)"
rm -rf .venv-vllm
"$python" -m venv .venv-vllm
install=(.venv-vllm/bin/python -m pip install --disable-pip-version-check --retries 10)
[ -t 1 ] || install+=(--quiet)
"${install[@]}" "$(grep '^torch==' constraints-vllm.txt)" # with its own dependencies: builds of torch differ in them
"${install[@]}" --no-deps --requirement constraints-vllm.txt
"${install[@]}" --no-deps --no-build-isolation --editable .
echo "$wanted" >"$marker"
