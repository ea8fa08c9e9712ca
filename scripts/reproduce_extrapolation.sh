#!/usr/bin/env bash
# Train short, test long, done properly: several methods, lengths and seeds; writes docs/results.md.
# Makes the environment if there is none. Options: see scripts/reproduce_extrapolation.py --help.
set -euo pipefail
here="$PWD"
cd "$(dirname "$0")/.."
. scripts/setup_env.sh
root="$PWD"
cd "$here"
exec python "$root/scripts/reproduce_extrapolation.py" "$@"
