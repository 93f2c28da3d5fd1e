#!/bin/sh
# neon_instructions.sh OBJDUMP OBJECT [dotprod]: kernels on packed tiles must multiply bytes, by sdot where there is one
# and by smull elsewhere, and look levels up by tbl, all but those of eight bits, which need not.
set -e
code=$("$1" -dC --no-show-raw-insn "$2")
printf '%s\n' "$code" | awk -v product="${3:+sdot}" '
  BEGIN { if (product == "") product = "smull" }
  function done() {
    if (name != "") {
      kernels++
      if (products < 4) { print "fewer than 4 " product " in " name; bad++ }
      looked += tables > 0
      if (tables == 0 && name !~ /kvpack::Q8_0/) { print "no tbl in " name; bad++ }
    }
    name = ""
  }
  /^[0-9a-f]+ </ {
    done()
    if (/::(score|accumulate_planes)</) { name = $0; products = 0; tables = 0 }
  }
  $2 == product || $2 == product "2" { products++ }
  $2 == "tbl" || $2 == "tbx" { tables++ }
  END { done(); print kernels " kernels, " looked " look levels up"; exit bad > 0 || kernels < 100 }
'
