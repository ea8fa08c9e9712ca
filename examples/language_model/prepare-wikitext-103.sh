#!/usr/bin/env bash
# Puts WikiText-103 at word level into wikitext-103/: wiki.{train,valid,test}.tokens.
# WIKITEXT_URL names another address; --from takes a zip or a folder that is there already.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/prepare_wikitext_103.py" "$@"
