// The trellis codecs: randomized Hadamard rotation, a trellis code (codecs/trellis.h), one scale per vector.
//
// A sequence runs along the depth axis of the tile (format.h): for keys along the dims of a token, for values along the
// 64 tokens of a dim. It visits depths 0, 4, 8, ..., then 1, 5, 9, ..., then those from 2 and from 3: the four byte
// columns of a line are four runs of one circular sequence, each a plain bit stream that byte shifts decode, 64 bytes
// at a time:
//
//   ... | code i-2 | code i-1 | code i |          bit e = the last (newest) bit of code i
//         `------- window: bits e-8 .. e ------'  index = bits e-7 .. e-1, negative where bit e xor bit e-8 is set
//
// So decoding is random access, there is no state to store, and every bit string is a valid code. Of half-bit codes,
// even steps are those in even dwords: a column of a tile has an even number of dwords.
//
// Source: trellis-coded quantization (Marcellin, Fischer 1990); bitshift trellises as in QTIP (arXiv 2406.11235).
#pragma once
#include "codecs/traits.h"
#include "codecs/trellis.h"

namespace kvpack {

template <class TrellisCode>
struct Tcq : CodecDefaults {
  using Code = TrellisCode;
  static constexpr double kBits = (Code::kEvenBits + Code::kOddBits) / 2.0;
  static constexpr bool kRotated = true, kScaleRules = true, kTrellis = true;
  static constexpr double kUnit = Code::levels().unit / 8192.0;
};

using Tcq1 = Tcq<Tcq1Code>;
using Tcq2 = Tcq<Tcq2Code>;
using Tcq3 = Tcq<Tcq3Code>;
using Tcq4 = Tcq<Tcq4Code>;
using Tcq25 = Tcq<Tcq25Code>;
using Tcq35 = Tcq<Tcq35Code>;

// Step n of a sequence of `steps` is this depth of the tile.
constexpr int32_t trellis_depth(int32_t n, int32_t steps) { return n % (steps / 4) * 4 + n / (steps / 4); }

// The window after the code of step n, and its level. Never out of line: ISA units export nothing but their table.
template <class Code>
[[gnu::always_inline]] constexpr uint32_t next_window(uint32_t window, uint32_t code, int32_t n) {
  const int32_t bits = n % 2 == 0 ? Code::kEvenBits : Code::kOddBits;
  return window >> bits | code << (9 - bits);
}
template <class Code>
[[gnu::always_inline]] constexpr int8_t window_level(uint32_t window, int32_t n) {
  constexpr TrellisLevels levels = Code::levels();
  const int8_t level = levels.level[trellis_table<Code>(n)][(window >> 1) & 127];
  return static_cast<int8_t>(((window ^ (window >> 8)) & 1) != 0 ? -level : level);
}

}  // namespace kvpack
