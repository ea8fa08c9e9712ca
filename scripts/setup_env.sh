# Makes .venv with the project and its tested dependencies, once; sourced by the other scripts.
# PYTHON chooses the interpreter (>= 3.10).
VENV="${VENV:-$PWD/.venv}"
if [ ! -x "$VENV/bin/python" ]; then
  echo "Making $VENV ..." >&2
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "Python >= 3.10 is needed; name one with PYTHON=/path/to/python" >&2
    exit 1
  }
  "${PYTHON:-python3}" -m venv "$VENV"
fi
# Installed again whenever the dependencies change, or if an earlier installation was cut off.
STAMP="$VENV/.installed"
WANTED="$(cat pyproject.toml constraints.txt | cksum)${EXTRAS:-}"
if [ ! -f "$STAMP" ] || [ "$(cat "$STAMP")" != "$WANTED" ]; then
  echo "Installing the project (the first time fetches PyTorch) ..." >&2
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    -c constraints.txt -e ".${EXTRAS:-}" >&2
  printf '%s' "$WANTED" > "$STAMP"
fi
export PATH="$VENV/bin:$PATH"
