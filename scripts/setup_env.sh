# Makes .venv with the project and its tested dependencies, once; sourced by the other scripts.
# PYTHON chooses the interpreter (>= 3.10), EXTRAS what is needed besides, such as "plot test".
VENV="${VENV:-$PWD/.venv}"
if [ ! -x "$VENV/bin/python" ]; then
  echo "Making $VENV ..." >&2
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "Python >= 3.10 is needed; name one with PYTHON=/path/to/python" >&2
    exit 1
  }
  "${PYTHON:-python3}" -m venv "$VENV"
fi
# Installed again whenever the dependencies change, if something is missing, or if an earlier
# installation was cut off. Extras once installed stay, so that scripts can take turns.
STAMP="$VENV/.installed"
SUM="$(cat pyproject.toml constraints.txt | cksum)"
THERE_SUM="" THERE=""
if [ -f "$STAMP" ]; then
  { read -r THERE_SUM && read -r THERE; } < "$STAMP" || true
fi
ALL="$(printf '%s\n' $THERE ${EXTRAS:-} | sort -u | xargs)"
if [ "$THERE_SUM" != "$SUM" ] || [ "$THERE" != "$ALL" ]; then
  echo "Installing the project (the first time fetches PyTorch) ..." >&2
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    -c constraints.txt -e ".${ALL:+[${ALL// /,}]}" >&2
  printf '%s\n' "$SUM" "$ALL" > "$STAMP"
fi
export PATH="$VENV/bin:$PATH"
