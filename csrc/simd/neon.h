// Policies "neon" (Armv8-A) and "neon_dotprod" (with sdot and udot). 4 lanes. What a policy provides is described in
// scalar.h.
//
// There are no products of unsigned with signed bytes. Keys are signed, as queries are. Values are unsigned, as
// probabilities are, so that these have eight bits: 128 is added to their levels, and 128 times the sum of the
// probabilities is taken from the sums. What the version without dot products relies on: two products of keys fit
// 16 bits (2 * 127 * 128 = 32512), and one of values does (255 * 255 = 65025); two of these are added in 32.
#pragma once
#include <arm_neon.h>

#include "kvpack/types.h"
#include "simd/half.h"

namespace {

struct Neon {
  using I = int32x4_t;
  using F = float32x4_t;
  using Code = int8x16_t;
  static constexpr int kLanes = 4, kGroup = 4, kAccumulators = 16, kProbBase = 256, kKeyOffset = 0, kValueOffset = 128,
                       kOpenLines = 1;
  static constexpr bool kAddsPairs = false;
  static constexpr int kExpandsFrom = 0;

  static uint8x16_t bytes(I v) { return vreinterpretq_u8_s32(v); }
  static I from(uint8x16_t v) { return vreinterpretq_s32_u8(v); }

  static I load_bytes(const uint8_t* p) { return from(vld1q_u8(p)); }
  static I splat(int32_t v) { return vdupq_n_s32(v); }
  static I shift_right_16(I v, int n) {
    return vreinterpretq_s32_u16(vshlq_u16(vreinterpretq_u16_s32(v), vdupq_n_s16(static_cast<int16_t>(-n))));
  }
  template <int Mask>
  static I select_bits(I a, I b) {
    return from(vbslq_u8(vdupq_n_u8(Mask), bytes(a), bytes(b)));
  }
  template <int A, int B>
  static I join_bits(I a, I b) {
    return select_bits<A>(a, from(vandq_u8(bytes(b), vdupq_n_u8(B))));
  }

  struct TableBytes {
    alignas(16) int8_t level[16];
  };
  template <int Bits>
  struct Table {
    int8x16_t level;
  };
  template <int Bits>
  static constexpr TableBytes table_bytes(const int8_t* level, int offset) {
    TableBytes t{};
    for (int i = 0; i < 16; ++i) t.level[i] = static_cast<int8_t>(level[i & ((1 << Bits) - 1)] + offset);
    return t;
  }
  template <int Bits>
  static Table<Bits> load_table(const TableBytes& t) {
    return {vld1q_s8(t.level)};
  }
  // Byte shifts do not mix neighbours, so the top field needs no mask.
  template <int Bits, int Pos>
  static I look_up(const Table<Bits>& t, I raw) {
    uint8x16_t field = bytes(raw);
    if constexpr (Pos != 0) field = vshrq_n_u8(field, Pos == 0 ? 1 : Pos);
    if constexpr (Pos + Bits < 8) field = vandq_u8(field, vdupq_n_u8((1 << Bits) - 1));
    return vreinterpretq_s32_s8(vqtbl1q_s8(t.level, field));
  }
  static I shift_left_16(I v, int n) {
    return vreinterpretq_s32_u16(vshlq_u16(vreinterpretq_u16_s32(v), vdupq_n_s16(static_cast<int16_t>(n))));
  }
  static I rotate_dwords_8(I v) {
    const uint32x4_t u = vreinterpretq_u32_s32(v);
    return vreinterpretq_s32_u32(vsriq_n_u32(vshlq_n_u32(u, 8), u, 24));
  }
  static I exclusive_or(I a, I b) { return veorq_s32(a, b); }
  static I add_bytes(I a, I b) { return from(vaddq_u8(bytes(a), bytes(b))); }
  struct Table128 {
    int8x16x4_t low, high;
  };
  static Table128 load_table_128(const int8_t* level) { return {vld1q_s8_x4(level), vld1q_s8_x4(level + 64)}; }
  // An index beyond 63 gives 0 in the first look-up and keeps that result in the second.
  static I look_up_128(const Table128& t, I raw) {
    const uint8x16_t index = vandq_u8(bytes(raw), vdupq_n_u8(0x7f));
    const int8x16_t low = vqtbl4q_s8(t.low, index);
    return vreinterpretq_s32_s8(vqtbx4q_s8(low, t.high, vsubq_u8(index, vdupq_n_u8(64))));
  }
  template <int Bit>
  static I negate_where(I v, I signs) {
    return negate_bytes(v, from(vtstq_u8(bytes(signs), vdupq_n_u8(1 << Bit))));
  }
  static I flip_sign_bit(I v) { return from(veorq_u8(bytes(v), vdupq_n_u8(0x80))); }
  static I negate_bytes(I v, I mask) { return from(vsubq_u8(veorq_u8(bytes(v), bytes(mask)), bytes(mask))); }
  static Code expand(I levels) { return vreinterpretq_s8_s32(levels); }

  static void store_operand(int32_t* operand, int at, F v) {
    store_low_bytes(reinterpret_cast<uint8_t*>(operand) + at, v);
  }
  template <bool Signed = false>
  static void store_tile(int32_t* operand, const F (&v)[64 / kLanes]) {
    for (int i = 0; i < 64 / kLanes; ++i) store_operand(operand, i * kLanes, v[i]);
  }
  template <int>
  static F prob_bound(F v) {
    return v;
  }
  // The first two bytes of every dword, then the last two: products within either half add up in pairs to dwords. Of
  // level bytes once for all rows, of an operand once for all vectors in flight.
  static uint8x16_t halves(uint8x16_t v) {
    const uint16x8_t pairs = vreinterpretq_u16_u8(v);
    return vreinterpretq_u8_u16(vuzp1q_u16(pairs, vrev32q_u16(pairs)));
  }
  template <kvpack::Side S>
  static I dot(I acc, Code code, const int32_t* operand) {
    if constexpr (S == kvpack::Side::key) {
      const int8x16_t w = vreinterpretq_s8_s32(vdupq_n_s32(*operand));
      const int16x8_t low = vmull_s8(vget_low_s8(code), vget_low_s8(w)), high = vmull_high_s8(code, w);
      return vpadalq_s16(acc, vpaddq_s16(low, high));
    } else {
      const uint8x16_t levels = halves(bytes(vreinterpretq_s32_s8(code))), w = halves(bytes(vdupq_n_s32(*operand)));
      const uint16x8_t first = vmull_u8(vget_low_u8(levels), vget_low_u8(w)), last = vmull_high_u8(levels, w);
      return vreinterpretq_s32_u32(vpadalq_u16(vpadalq_u16(vreinterpretq_u32_s32(acc), first), last));
    }
  }

  static F load(const float* p) { return vld1q_f32(p); }
  static F load_int8(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
  }
  template <int>
  static F load_repeated(const float* p) {
    return load(p);
  }
  static void store(float* p, F v) { vst1q_f32(p, v); }
  static F set1(float v) { return vdupq_n_f32(v); }
  static F zero() { return vdupq_n_f32(0.0F); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F max_size(F a, F b) { return vmaxq_f32(a, vabsq_f32(b)); }
  static F max_bits(F a, F b) {
    return vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(a), vreinterpretq_s32_f32(b)));
  }
  static F min(F a, F b) { return vminq_f32(a, b); }
  static F abs(F a) { return vabsq_f32(a); }
  static F copy_sign(F magnitude, F sign) { return vbslq_f32(vdupq_n_u32(0x80000000U), sign, magnitude); }
  static F round_even(F a) { return vrndnq_f32(a); }
  static F truncate(F a) { return vrndq_f32(a); }
  static F to_float(I v) { return vcvtq_f32_s32(v); }
  static F add_to_exponent(F a, F n) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), vshlq_n_s32(vreinterpretq_s32_f32(n), 23)));
  }
  static I count_where_greater(I n, F a, F b) { return vsubq_s32(n, vreinterpretq_s32_u32(vcgtq_f32(a, b))); }
  static F zero_where_less(F v, F a, F b) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vcltq_f32(a, b)));
  }
  static F look_up_8(const float* table, I n) {
    const uint8x16x2_t bytes = {{vreinterpretq_u8_f32(vld1q_f32(table)), vreinterpretq_u8_f32(vld1q_f32(table + 4))}};
    const uint32x4_t at = vmlaq_n_u32(vdupq_n_u32(0x03020100U), vreinterpretq_u32_s32(n), 0x04040404U);
    return vreinterpretq_f32_u8(vqtbl2q_u8(bytes, vreinterpretq_u8_u32(at)));
  }
  static float reduce_16(const F (&part)[4]) {
    const F four = vaddq_f32(vaddq_f32(part[0], part[2]), vaddq_f32(part[1], part[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  static float reduce_max(F v) { return vmaxvq_f32(v); }
  static float reduce_max_bits(F v) { return bits_float(vmaxvq_u32(vreinterpretq_u32_f32(v))); }
  static uint32_t equal_lanes(F a, F b) {
    const uint32_t bit[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vceqq_f32(a, b), vld1q_u32(bit)));
  }
  static uint32_t greater_lanes(F a, F b) { return vmaxvq_u32(vcgtq_f32(a, b)); }
  static float reduce_add(F v) { return vaddvq_f32(v); }
  template <int Width>
  static F hadamard_in_lane(F v) {
    static_assert(Width == 4);
    const float swap_signs[2][4] = {{1, 1, -1, -1}, {1, -1, 1, -1}};
    v = vfmaq_f32(vextq_f32(v, v, 2), v, vld1q_f32(swap_signs[0]));
    return vfmaq_f32(vrev64q_f32(v), v, vld1q_f32(swap_signs[1]));
  }
  static void store_signed(uint8_t* p, I n, F sign, int32_t middle) {
    store_bytes(p, vaddq_s32(veorq_s32(n, vshrq_n_s32(vreinterpretq_s32_f32(sign), 31)), vdupq_n_s32(middle)));
  }
  static void store_low_bytes(uint8_t* p, F v) { store_bytes(p, vcvtq_s32_f32(v)); }
  static void store_bytes(uint8_t* p, I v) {
    const uint16x4_t half = vmovn_u32(vreinterpretq_u32_s32(v));
    const uint8x8_t low = vmovn_u16(vcombine_u16(half, half));
    vst1_lane_u32(reinterpret_cast<uint32_t*>(p), vreinterpret_u32_u8(low), 0);
  }
  static void reduce_add_4(F a, F b, F c, F d, float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
  }
  static void reduce_max_4(F a, F b, F c, F d, float* out) {
    vst1q_f32(out, vpmaxq_f32(vpmaxq_f32(a, b), vpmaxq_f32(c, d)));
  }
  // Inlined before GCC finds that it has no effects, and drops its calls (tests/cpp/instructions.sh).
  [[gnu::always_inline]] static void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

  static void store_int16(int16_t* p, F v) { vst1_s16(p, vqmovn_s32(vcvtnq_s32_f32(v))); }

  struct W16 {
    using V = uint16x8_t;
    static constexpr int kLanes = 8;
    static int16x8_t s(V v) { return vreinterpretq_s16_u16(v); }
    static V u(int16x8_t v) { return vreinterpretq_u16_s16(v); }
    static V load(const void* p) { return vld1q_u16(static_cast<const uint16_t*>(p)); }
    static void store(void* p, V v) { vst1q_u16(static_cast<uint16_t*>(p), v); }
    static V splat(int n) { return vdupq_n_u16(static_cast<uint16_t>(n)); }
    static V splat_pair(int32_t pair) { return vreinterpretq_u16_s32(vdupq_n_s32(pair)); }
    static V add_saturated(V a, V b) { return u(vqaddq_s16(s(a), s(b))); }
    static V sub_saturated(V a, V b) { return u(vqsubq_s16(s(a), s(b))); }
    static V add_unsigned(V a, V b) { return vqaddq_u16(a, b); }
    static V sub(V a, V b) { return vsubq_u16(a, b); }
    static V min(V a, V b) { return vminq_u16(a, b); }
    // vqrdmulh gives 32767 for the square of -32768 only; it is 32768.
    static V square(V a) {
      const V v = u(vqrdmulhq_s16(s(a), s(a)));
      return vsubq_u16(v, vceqq_u16(v, splat(32767)));
    }
    template <int Bits>
    static V clear_low(V v) {
      return vandq_u16(v, splat(-1 << Bits));
    }
    template <int Bits>
    static V set_low(V v, int n) {
      return vorrq_u16(clear_low<Bits>(v), splat(n));
    }
    template <int Shift, int Bits>
    static V push(V word, V v) {
      return vorrq_u16(vshlq_n_u16(word, Shift), vandq_u16(v, splat((1 << Bits) - 1)));
    }
  };

  template <kvpack::Dtype T>
  static F load_element(const uint8_t* p) {
    if constexpr (T == kvpack::Dtype::f32) return vld1q_f32(reinterpret_cast<const float*>(p));
    if constexpr (T == kvpack::Dtype::e4m3) {  // bit 7 is the sign, and stays above the exponent
      uint32_t four;
      __builtin_memcpy(&four, p, sizeof four);
      const int16x4_t wide = vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))));
      const uint16x4_t fields = vand_u16(vreinterpret_u16_s16(vshl_n_s16(wide, 7)), vdup_n_u16(0xbf80));
      return vcvt_f32_f16(vreinterpret_f16_u16(fields));
    }
    const uint16x4_t h = vld1_u16(reinterpret_cast<const uint16_t*>(p));
    if constexpr (T == kvpack::Dtype::f16) return vcvt_f32_f16(vreinterpret_f16_u16(h));
    return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
  }
};

#ifdef __ARM_FEATURE_DOTPROD
struct NeonDotprod : Neon {
  template <kvpack::Side S>
  static I dot(I acc, Code code, const int32_t* operand) {
    const I w = vdupq_n_s32(*operand);
    if constexpr (S == kvpack::Side::key) return vdotq_s32(acc, code, vreinterpretq_s8_s32(w));
    return vreinterpretq_s32_u32(vdotq_u32(vreinterpretq_u32_s32(acc), vreinterpretq_u8_s8(code), bytes(w)));
  }
};
#endif

}  // namespace
