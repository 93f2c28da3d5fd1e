// KIVI: asymmetric round-to-nearest, not rotated (arXiv 2402.02750). A step and a zero for 32 tokens of a key channel,
// or for 32 dims of a value.
//
//   keys:   fp16 | steps [2 groups of tokens][d] | zeros [2 groups][d] |
//   values: fp16 | steps [block of dims][64 tokens] | zeros [block][64 tokens] |
//
// Kernels read x = (zero + step * (2^bits - 1) / 2) + step / 2 * level: levels around zero halve what the rounding of
// queries and probabilities costs.
#pragma once
#include "codecs/traits.h"

namespace kvpack {

constexpr int32_t kKeyGroups = 2;  // of 32 tokens, in a tile

template <int32_t Bits>
struct Kivi : CodecDefaults {
  static constexpr int32_t kBits = Bits, kScaleBlock = 32;
  static constexpr bool kAsymmetric = true;
  static constexpr float kMiddle = static_cast<float>((1 << Bits) - 1) / 2.0F;
  static constexpr int32_t scale_rows(Side side, int32_t head_dim) {
    return side == Side::key ? 2 * kKeyGroups * head_dim / kTile : 2 * scale_blocks(kScaleBlock, Bits, head_dim);
  }
};

struct Kivi2 : Kivi<2> {
  static constexpr LevelTable kLevels{{-3, -1, 1, 3}};
};

struct Kivi4 : Kivi<4> {
  static constexpr LevelTable kLevels{{-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15}};
};

}  // namespace kvpack
