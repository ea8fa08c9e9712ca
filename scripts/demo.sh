#!/usr/bin/env bash
# Text in, two language models trained on short sequences, their perplexity on long ones out.
# Makes the environment if there is none. Options: see scripts/demo.py --help.
set -euo pipefail
here="$PWD"
cd "$(dirname "$0")/.."
EXTRAS="plot"
. scripts/setup_env.sh
root="$PWD"
cd "$here"
exec python "$root/scripts/demo.py" "$@"
