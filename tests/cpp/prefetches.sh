#!/bin/sh
# prefetches.sh OBJDUMP OBJECT: every kernel that reads packed tiles must hold prefetch instructions. GCC takes a function
# that does nothing else for one without effects, and drops its calls, unless it was inlined before it found out.
set -e
code=$("$1" -dC --no-show-raw-insn "$2")
printf '%s\n' "$code" | awk '
  function done() { if (name != "") { kernels++; if (!found) { print "no prefetch in " name; bad++ } } name = "" }
  /^[0-9a-f]+ </ {
    done()
    if (/::(score|accumulate_planes|exact_score)</) { name = $0; found = 0 }
  }
  /\t(prefetch|prfm)/ { found = 1 }
  END { done(); print kernels " kernels"; exit bad > 0 || kernels < 100 }
'
