#!/usr/bin/env bash
# Runs the tests, a file at a time on each core; makes the environment if there is none. Arguments
# go to pytest (`-n 0` runs in one process, for a debugger).
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS="plot test"
. scripts/setup_env.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n auto --dist loadfile "$@"
