#!/bin/sh
# instructions.sh OBJDUMP OBJECT KEYS VALUES LOOK_UP: what the kernels that read packed tiles must hold.
#   prefetches: GCC takes a function that does nothing else for one without effects, and drops its calls, unless it was
#     inlined before it found out
#   products of bytes, by the instruction KEYS in those of integer scores, and VALUES in those of integer sums
#   look-ups of levels, by LOOK_UP, in all of these but those of eight and five bits, which need not
# Trellis codes may be looked up, and tiles to come prefetched, by expand_levels: the kernels that read its bytes do not.
# KEYS, VALUES and LOOK_UP are regular expressions.
set -e
code=$("$1" -dC --no-show-raw-insn "$2")
printf '%s\n' "$code" | awk -v keys="^($3)\$" -v values="^($4)\$" -v look_up="^($5)\$" '
  function missing(what) { print "no " what " in " name; bad++ }
  function done() {
    if (name != "") {
      kernels++
      if (!prefetches && !expanded) missing("prefetch")
      if (integer && products < 4) missing("four " product)
      looked += tables > 0
      if ((integer || expands) && tables == 0 && !expanded && name !~ /kvpack::Q[58]_0/) missing(look_up)
    }
    name = ""
  }
  /^[0-9a-f]+ </ {
    done()
    if (/::((score|accumulate)_fixed_point|score|accumulate_planes|exact_score|expand_levels)</) {
      name = $0
      expands = /::expand_levels</
      expanded = /::LevelBytes[,>]/
      integer = !expands && !/::exact_score</
      product = /::score(_fixed_point)?</ ? keys : values
      prefetches = products = tables = 0
    }
  }
  { instruction = $2 == "{vex}" ? $3 : $2 }
  instruction ~ /^(prefetch|prfm)/ { prefetches++ }
  instruction ~ product { products++ }
  instruction ~ look_up { tables++ }
  END { done(); print kernels " kernels, " looked " look levels up"; exit bad > 0 || kernels < 100 || looked == 0 }
'
