// fp16, bf16 and e4m3 in integer arithmetic: the same bits on every level, whatever the floating-point control register
// says. Everything is in an anonymous namespace because ISA units include it under their own flags.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

[[maybe_unused]] inline uint32_t float_bits(float v) {
  uint32_t b;
  std::memcpy(&b, &v, 4);
  return b;
}
[[maybe_unused]] inline float bits_float(uint32_t b) {
  float v;
  std::memcpy(&v, &b, 4);
  return v;
}

// float32 to fp16, round to nearest even, subnormals kept, overflow to infinity.
[[maybe_unused]] inline uint16_t float_to_half(float v) {
  const uint32_t b = float_bits(v), sign = (b >> 16) & 0x8000U, mag = b & 0x7fffffffU;
  if (mag >= 0x7f800000U) return static_cast<uint16_t>(sign | (mag > 0x7f800000U ? 0x7e00U : 0x7c00U));
  if (mag >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);  // rounds to 65536 or more
  if (mag < 0x33000001U) return static_cast<uint16_t>(sign);             // at most half the smallest subnormal
  if (mag >= 0x38800000U)  // no branch on how it rounds, which nothing predicts
    return static_cast<uint16_t>(sign | ((mag - 0x38000000U + 0xfffU + (mag >> 13 & 1U)) >> 13));
  const uint32_t shift = 126U - (mag >> 23);  // 14..24, to a subnormal
  const uint32_t m = (mag & 0x7fffffU) | 0x800000U, rest = m & ((1U << shift) - 1), tie = 1U << (shift - 1);
  uint32_t half = m >> shift;
  half += (rest > tie || (rest == tie && (half & 1U) != 0)) ? 1U : 0U;
  return static_cast<uint16_t>(sign | half);
}

[[maybe_unused]] inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000U) << 16, e = (h >> 10) & 31U, m = h & 0x3ffU;
  if (e == 31U) return bits_float(sign | 0x7f800000U | (m << 13));
  if (e != 0) return bits_float(sign | ((e + 112U) << 23) | (m << 13));
  const float v = static_cast<float>(m) * 5.9604644775390625e-08F;  // 2^-24, exact
  return bits_float(float_bits(v) | sign);
}

[[maybe_unused]] inline float bfloat_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

// float32 to e4m3, round to nearest even, larger magnitudes to 448; the sign stays. Wants the IEEE mode.
[[maybe_unused]] inline uint8_t float_to_e4m3(float v) {
  const uint32_t b = float_bits(v), mag = b & 0x7fffffffU, size = mag < 0x43e00000U ? mag : 0x43e00000U;
  const uint32_t normal = ((size + 0x7ffffU + (size >> 20 & 1U)) >> 20) - 960U;
  const uint32_t subnormal = float_bits(bits_float(size) + 16384.0F) & 0xffU;  // in steps of 2^-9
  const uint32_t small = 0U - static_cast<uint32_t>(size < 0x3c800000U);       // a choice that vectorizes
  return static_cast<uint8_t>((b >> 24 & 0x80U) | (subnormal & small) | (normal & ~small));
}

// The fields of e4m3 moved into those of fp16: the value times 2^-8, of which 256 is the unit.
constexpr float kE4m3Unit = 256.0F;
[[maybe_unused]] inline uint16_t e4m3_to_half(uint8_t code) {
  return static_cast<uint16_t>((code & 0x80U) << 8 | (code & 0x7fU) << 7);
}

// float32 to bf16, round to nearest even; NaN stays NaN.
[[maybe_unused]] inline uint16_t float_to_bfloat(float v) {
  const uint32_t b = float_bits(v);
  if ((b & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>((b >> 16) | 0x40U);
  return static_cast<uint16_t>((b + 0x7fffU + ((b >> 16) & 1U)) >> 16);
}

}  // namespace
