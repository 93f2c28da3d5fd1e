// The power of two that is taken out of vectors before they are coded, and fp16 scales that it goes back into.
#pragma once
#include <cstdint>

#include "simd/half.h"

namespace {

// What an encoder reports for a vector: 0, or the reason why it cannot be coded.
enum : int32_t { kCoded = 0, kNonFinite = 1, kScaleOverflow = 2 };

// The first of two statuses (EncodeArgs): what is not finite first, then the earlier token.
[[maybe_unused]] inline int32_t first_of(int32_t a, int32_t b) {
  if (a == 0 || b == 0) return a + b;
  if ((a > 0) != (b > 0)) return (a > b ? a : b);
  return (a < 0 ? -a : a) <= (b < 0 ? -b : b) ? a : b;
}

// 2^n, -126 <= n <= 127.
inline float two_to(int n) { return __builtin_bit_cast(float, static_cast<uint32_t>(n + 127) << 23); }

// 2^-e with 2^e <= m < 2^(e+1), as two factors: the second is needed where 2^-e exceeds the float range.
struct PowerOfTwo {
  int e = 0;
  float down = 1.0F, down_again = 1.0F;
  PowerOfTwo() = default;
  explicit PowerOfTwo(float m) {
    const auto biased = static_cast<int>(__builtin_bit_cast(uint32_t, m) >> 23);
    e = biased != 0 ? biased - 127 : -118 - __builtin_clz(__builtin_bit_cast(uint32_t, m));
    // 2^-127, of the largest floats, is a denormal.
    down = e > 126 ? 0x1p-127F : two_to(e < -127 ? 127 : -e);
    down_again = e < -127 ? two_to(-e - 127) : 1.0F;
  }
};

// scale * 2^e in fp16. Where e is clamped the result is far out of the range of fp16 anyway: scale is 0, or its own
// exponent is small.
[[maybe_unused]] inline int32_t store_scale(float scale, int e, uint16_t* out) {
  const uint16_t half = float_to_half(scale * two_to(e < -126 ? -126 : e > 127 ? 127 : e));
  *out = half;
  return (half & 0x7c00U) == 0x7c00U ? kScaleOverflow : kCoded;
}

}  // namespace
