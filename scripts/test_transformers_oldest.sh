#!/usr/bin/env bash
# Runs tests/huggingface with the oldest transformers that is supported (tests/huggingface/oldest.txt).
# It lies in a folder of its own in the environment, $VENV or .venv, and is installed once.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-$PWD/.venv}"
folder="$venv/transformers-oldest"
wanted=tests/huggingface/oldest.txt
if ! cmp -s "$wanted" "$folder/installed.txt"; then
  rm -rf "$folder"
  "$venv/bin/python" -m pip install -q --no-deps --target "$folder" -r "$wanted"
  cp "$wanted" "$folder/installed.txt"
fi
PYTHONPATH="$folder" exec "$venv/bin/python" -m pytest -q tests/huggingface \
  --ignore tests/huggingface/test_export.py --ignore tests/huggingface/test_lm_eval.py "$@"
