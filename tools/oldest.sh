#!/bin/sh
# The tests of the cache, and of what builds on it, with the oldest transformers that is supported:
# tools/oldest.sh [pytest arguments]. They run in .venv, with requirements/oldest.txt in front of what is there.
cd "$(dirname "$0")/.." || exit 1
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
python=.venv/bin/python
folder=build/oldest
if ! cmp -s requirements/oldest.txt "$folder/requirements.txt"; then
  rm -rf "$folder"
  $python -m pip --disable-pip-version-check install -qq --no-deps --target "$folder" -r requirements/oldest.txt || exit 1
  cp requirements/oldest.txt "$folder/requirements.txt"
fi
export PYTHONPATH="$PWD/$folder"
$python -c 'import transformers; print("transformers", transformers.__version__)' || exit 1
exec $python -m pytest -q -n 2 "$@" tests/families tests/hf tests/eval tests/cli tests/packaging/test_import.py
