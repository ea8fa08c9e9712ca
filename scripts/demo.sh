#!/usr/bin/env bash
# Text in, a language model trained on short sequences, its perplexity on long ones out.
# Makes the environment if there is none. Options: see scripts/demo.py --help.
set -euo pipefail
here="$PWD"
cd "$(dirname "$0")/.."
. scripts/setup_env.sh
root="$PWD"
cd "$here"
exec python "$root/scripts/demo.py" "$@"
