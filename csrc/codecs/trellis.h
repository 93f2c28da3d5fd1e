// Trellis-coded quantization: exactly k bits per value, most of what scalar codes leave on the table.
//
// The codes of a sequence are the bits of a path through a tail-biting bitshift trellis with 512 windows. The window of
// step i is the nine bits that end with code i, circularly:
//
//   ... | code i-2 | code i-1 | code i |          bit e = the last (newest) bit of code i
//         `------- window: bits e-8 .. e ------'
//
//   level = table[bits e-7 .. e-1], negated where bit e xor bit e-8 is set
//
// So decoding is random access, there is no state to store, and every bit string is a valid code. A sequence runs
// along the depth axis of the tile (format.h): for keys along the dims of a token, for values along the 64 tokens of a
// dim. It visits depths 0, 4, 8, ..., then 1, 5, 9, ..., then those from 2 and from 3: the four byte columns of a line
// are four runs of the same sequence, each a plain bit stream, which byte shifts decode 4 x 16 at a time.
//
// Source: trellis-coded quantization (Marcellin, Fischer 1990); bitshift trellises as in QTIP (arXiv 2406.11235).
#pragma once
#include "codecs/traits.h"
#include "codecs/trellis_tables.h"

namespace kvpack {

constexpr int32_t kWindowBits = 9;

template <int32_t Bits>
struct Trellis : CodecDefaults {
  static constexpr int32_t kBits = Bits;
  static constexpr bool kRotated = true, kScaleRules = true, kTrellis = true;
  static constexpr const TrellisTable& kTable = kTrellisTables[Bits - 1];
  static constexpr double kUnit = kTrellisTables[Bits - 1].unit;
};

using Tcq1 = Trellis<1>;
using Tcq2 = Trellis<2>;
using Tcq3 = Trellis<3>;
using Tcq4 = Trellis<4>;

// Step n of a sequence of `steps` is this depth of the tile.
constexpr int32_t trellis_depth(int32_t n, int32_t steps) { return n % (steps / 4) * 4 + n / (steps / 4); }

// The level of a nine-bit window (newest bit highest).
constexpr int8_t trellis_level(const TrellisTable& table, uint32_t window) {
  const int8_t level = table.level[(window >> 1) & 127];
  return static_cast<int8_t>(((window ^ (window >> 8)) & 1) != 0 ? -level : level);
}

}  // namespace kvpack
