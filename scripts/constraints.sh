#!/usr/bin/env bash
# Write constraints.txt anew: what pip resolves today, from pyproject.toml alone, in an empty environment.
# Local version labels (torch's "+cpu") go, so that the pins hold for every build of a version.
set -euo pipefail
cd "$(dirname "$0")/.."

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3.11}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet hatchling editables
"$place/venv/bin/python" -m pip install --quiet --no-build-isolation --editable ".[dev]" "torch==2.13.0"
{
  echo "# Every dependency of \`make demo\` and \`make test\`, build and test tools included. Written by scripts/constraints.sh."
  "$place/venv/bin/python" -m pip freeze --all --exclude pip --exclude-editable | sed 's/+[a-z0-9.]*$//'
} >"$place/constraints.txt"
mv "$place/constraints.txt" constraints.txt
