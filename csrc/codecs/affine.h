// Block formats of ggml: 32 dims share an fp16 scale and a code is an integer, level = code - 2^(bits - 1). rq8_0 and
// rq4_0 are the same after the randomized Hadamard rotation: the honest baseline of every rotated codec.
#pragma once
#include "codecs/traits.h"

namespace kvpack {

struct Q8_0 : CodecDefaults {
  static constexpr int32_t kBits = 8, kScaleBlock = 32;
};

struct Q4_0 : CodecDefaults {
  static constexpr int32_t kBits = 4, kScaleBlock = 32;
  static constexpr bool kSignedScales = true;
  static constexpr LevelTable kLevels{{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7}};
};

struct Q5_0 : CodecDefaults {
  static constexpr int32_t kBits = 5, kScaleBlock = 32;
  static constexpr bool kSignedScales = true;
};

struct Rq8_0 : Q8_0 {
  using Reads = Q8_0;
  static constexpr bool kRotated = true;
};

struct Rq4_0 : Q4_0 {
  using Reads = Q4_0;
  static constexpr bool kRotated = true;
};

}  // namespace kvpack
