// TurboQuant with an outlier split: a quarter of the channels, those of the largest energy, gets a bit more than the
// others (arXiv 2504.19874, section 4.3; there at calibrated channels, here with a map of each row and KV head).
//
//   map   d bits, bit i % 8 of byte i / 8 is channel i: set for an outlier; all clear where no token was not zeros
//   part 1: the outliers, ascending; part 2: the others; each a vector of its own to the codec that it is
//
// The parts are encoded, scored, accumulated and decoded by the kernels of their codecs, at sizes that need not be
// those of heads; only core/split.h knows of maps.
#pragma once
#include "codecs/lloyd_max.h"

namespace kvpack {

template <class Outliers, class Others>
struct Split : CodecDefaults {
  using First = Outliers;
  using Second = Others;
  static constexpr double kBits = (First::kBits + 3 * Second::kBits) / 4.0;
  static constexpr bool kRotated = true, kScaleRules = true, kSplit = true;
  // A quarter in whole lane blocks, rounded to even.
  static constexpr int32_t part_dims(int32_t part, int32_t head_dim) {
    const int32_t outliers = head_dim == 160 ? 32 : (head_dim + 32) / 64 * 16;
    return part == 0 ? outliers : head_dim - outliers;
  }
  static constexpr size_t code_bytes(int32_t head_dim) {
    return static_cast<size_t>(kTile / 8 *
                               (part_dims(0, head_dim) * First::kBits + part_dims(1, head_dim) * Second::kBits));
  }
};

using Tq25 = Split<Tq3, Tq2>;
using Tq35 = Split<Tq4, Tq3>;

}  // namespace kvpack
