#!/bin/sh
# Everything that `make test` runs, in .venv: tools/test.sh [--full] [pytest arguments]
# A failing step does not stop the next; a step that cannot run here says SKIPPED and why. pytest comes last, so that
# its summary ends the output, after one line on the steps.
cd "$(dirname "$0")/.." || exit 1
full=0
if [ "${1:-}" = --full ]; then
  full=1
  shift
fi
PATH="$PWD/.venv/bin:$PATH"
export PATH OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
export UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=detect_stack_use_after_return=1
export KVPACK_NOTEBOOK=small
export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-2}"
failed=0
steps=""
only=.
begun=$(date +%s)

# step NAME COMMAND...: runs it and notes how it went, and for how long.
step() {
  name=$1
  shift
  printf '\n== %s\n' "$name"
  start=$(date +%s)
  if "$@" </dev/null; then state=ok; else
    state=FAILED
    failed=1
  fi
  steps="$steps, $name $state $(($(date +%s) - start)) s"
  [ $state = ok ] || printf '== %s FAILED\n' "$name"
}

skip() {
  printf '\n== %s\nSKIPPED %s: %s\n' "$1" "$1" "$2"
  steps="$steps, $1 SKIPPED"
}

# Configures a build directory, builds it, runs its C++ tests: cpp LOG DIRECTORY CONFIGURE...
cpp() {
  log=build/$1.log
  directory=$2
  shift 2
  "$@" ${eigen:+-DEigen3_DIR="$eigen"} >"$log" 2>&1 || { cat "$log"; return 1; }
  cmake --build "$directory" >>"$log" 2>&1 || { tail -n 60 "$log"; return 1; }
  ctest --test-dir "$directory" --output-on-failure --no-tests=error --parallel "$CMAKE_BUILD_PARALLEL_LEVEL" \
    --tests-regex "$only"
}

neon() {
  if ! command -v aarch64-linux-gnu-g++ >/dev/null; then
    skip neon "no aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)"
  elif ! command -v qemu-aarch64 >/dev/null; then
    skip neon "no qemu-aarch64 (Debian: qemu-user)"
  else
    step neon cpp neon build/arm64-qemu cmake --preset arm64-qemu -DKVPACK_TEST_ALL="$full"
  fi
}

mkdir -p build
# The C++ tests use Eigen: the system's, or the one that pip installed (cmeel-eigen).
eigen=$(find "$PWD/.venv/lib" -type d -path "*cmeel.prefix/share/eigen3/cmake" 2>/dev/null | head -n 1)
step lint tools/lint.sh
# The tests of the core are linked to the objects that were installed.
installed=$(ls -dt build/cp3* | head -n 1)
step cpp cpp cpp "$installed" cmake "$installed" -DKVPACK_TESTS=ON
step sanitizers cpp asan build/asan cmake --preset asan -DKVPACK_TEST_ALL="$full"
case "$(uname -m)" in
aarch64 | arm64) skip neon "this machine is one: the C++ tests above ran on NEON" ;;
*) neon ;;
esac
if [ $full = 1 ]; then
  for level in $(.venv/bin/python -c 'import kvpack; print(*kvpack.isa.available())'); do
    step "operators-$level" env KVPACK_ISA="$level" .venv/bin/python -m pytest -q -n 2 tests/ops
  done
  # On machines with AVX-512 alone, AVX-VNNI's level is built in its encoding.
  if grep -qw avx_vnni /proc/cpuinfo; then
    skip avx-vnni "this machine has it: the C++ tests above ran on it"
  elif grep -qw avx512_vnni /proc/cpuinfo; then
    only=avx_vnni
    step avx-vnni cpp evex build/evex-vnni cmake --preset evex-vnni -DKVPACK_TEST_ALL=ON
    only=.
  else
    skip avx-vnni "this machine has neither AVX-VNNI nor AVX-512 VNNI"
  fi
  step operators-default env KVPACK_NO_NATIVE=1 .venv/bin/python -m pytest -q -n 2 tests/ops
  step oldest-transformers tools/oldest.sh
fi

printf '\n== steps so far: %s\n\n== pytest\n' "${steps#, }"
# xdist: loadgroup keeps tests together that share something expensive.
marked="not full"
[ $full = 0 ] || marked="full or not full"
.venv/bin/python -m pytest -n 2 --dist loadgroup --durations 15 --nbmake --nbmake-timeout 300 -m "$marked" \
  "$@" tests notebooks </dev/null || failed=1
if [ $failed = 0 ]; then state="all steps ok"; else state="FAILED (see the steps above)"; fi
echo "make test: $state, $(($(date +%s) - begun)) s"
exit $failed
