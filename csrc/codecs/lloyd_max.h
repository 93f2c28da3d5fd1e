// TurboQuant_mse: randomized Hadamard rotation, Lloyd-Max codebook of the standard normal, one scale per vector
// (arXiv 2504.19874, algorithm 1; the scale rules in kvpack/format.h).
//
// The int8 levels *are* the codebook. The unit is chosen so that rounding the Lloyd-Max centroids to int8 costs less
// than 0.06 % of the distortion; decision thresholds are the midpoints of the int8 levels.
#pragma once
#include "codecs/traits.h"

namespace kvpack {

template <int32_t Bits>
struct LloydMax : CodecDefaults {
  static constexpr int32_t kBits = Bits;
  static constexpr bool kRotated = true, kScaleRules = true;
};

struct Tq1 : LloydMax<1> {
  static constexpr double kUnit = 0.00797885;
  static constexpr LevelTable kLevels{{-100, 100}};
};

struct Tq2 : LloydMax<2> {
  static constexpr double kUnit = 0.015104;
  static constexpr LevelTable kLevels{{-100, -30, 30, 100}};
};

struct Tq3 : LloydMax<3> {
  static constexpr double kUnit = 0.024448;
  static constexpr LevelTable kLevels{{-88, -55, -31, -10, 10, 31, 55, 88}};
};

struct Tq4 : LloydMax<4> {
  static constexpr double kUnit = 0.026219;
  static constexpr LevelTable kLevels{{-104, -79, -62, -48, -36, -25, -15, -5, 5, 15, 25, 36, 48, 62, 79, 104}};
};

// Number k (1-based) of the positive thresholds: |z| above it moves the code one level outwards.
template <class Codec>
constexpr float threshold(int32_t k) {
  constexpr int32_t half = 1 << (Codec::kBits - 1);
  const int32_t sum = Codec::kLevels.level[half + k - 1] + Codec::kLevels.level[half + k];
  return static_cast<float>(sum / 2.0 * Codec::kUnit);
}

}  // namespace kvpack
