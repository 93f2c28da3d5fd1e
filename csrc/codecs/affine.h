// Block formats of ggml: 32 dims share an fp16 scale and a code is an integer, level = code - offset.
#pragma once
#include "codecs/traits.h"

namespace kvpack {

struct Q8_0 {
  static constexpr int32_t kBits = 8, kScaleBlock = 32;
  static constexpr bool kRotated = false, kSignedScales = false;
  static constexpr double kUnit = 0.0;
  static constexpr LevelTable kLevels{};
};

struct Q4_0 {
  static constexpr int32_t kBits = 4, kScaleBlock = 32;
  static constexpr bool kRotated = false, kSignedScales = true;
  static constexpr double kUnit = 0.0;
  static constexpr LevelTable kLevels{{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7}};
};

}  // namespace kvpack
