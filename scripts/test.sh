#!/usr/bin/env bash
# Runs the tests; makes the environment if there is none. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS="plot test"
. scripts/setup_env.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest "$@"
