#!/usr/bin/env bash
# The paper's WikiText-103 numbers from the published checkpoints: downloads data and models,
# preprocesses, evaluates, prints ours beside the paper's. Wants a GPU, some 12 GB of disk and the
# network. Makes the environment if there is none. Options: see scripts/reproduce_paper.py --help.
set -euo pipefail
here="$PWD"
cd "$(dirname "$0")/.."
. scripts/setup_env.sh
root="$PWD"
cd "$here"
exec python "$root/scripts/reproduce_paper.py" "$@"
