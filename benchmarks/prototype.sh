#!/bin/sh
# Builds and runs prototype.cpp against the kernels in the folder $1. Needs an AVX-512 machine and a built core ($2).
set -eu
prototypes=$1
core=$2
here=$(dirname "$0")
build=$(dirname "$core")
flags="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vnni -mavx512bf16 -mavx512fp16 -mfma -mf16c"
c++ -O3 -std=c++20 -w $flags -I"$prototypes" -c "$here/prototype_kernels.cpp" -o "$build/prototype_kernels.o"
c++ -O3 -std=c++20 -w $flags -c "$prototypes/codebooks.cpp" -o "$build/prototype_codebooks.o"
c++ -O2 -std=c++20 -Wall -Wextra -I"$here/../csrc" "$here/prototype.cpp" "$build/prototype_kernels.o" \
  "$build/prototype_codebooks.o" "$core" -o "$build/prototype" -lpthread
shift 2
"$build/prototype" "$@"
