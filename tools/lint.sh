#!/bin/sh
# ruff, mypy and clang-format, all of them even if one fails.
cd "$(dirname "$0")/.." || exit 1
bin=.venv/bin
failed=0
run() {
  echo "+ $*"
  "$@" || failed=1
}
run $bin/ruff check .
run $bin/ruff format --check .
run $bin/mypy
if [ ! -f .clang-format ]; then
  echo "SKIPPED clang-format: there is no .clang-format"
elif [ ! -x $bin/clang-format ]; then
  echo "SKIPPED clang-format: not installed (requirements/test.txt pins it)"
else
  sources=$(find csrc tests/cpp -name '*.h' -o -name '*.cpp')
  # shellcheck disable=SC2086 # a list
  run $bin/clang-format --dry-run --Werror $sources
fi
exit $failed
