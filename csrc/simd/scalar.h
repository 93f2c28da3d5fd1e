// Policy "scalar": one lane. The same templates as every other level, in plain C++; the yardstick for all of them.
//
// A policy names the vector types and about thirty operations; kernels are templates over it. What each must provide
// is listed here once; the other policies carry no second description.
//
//   I, F, Code            integer vector, float vector, level bytes in the form that dot() wants
//   kLanes                floats (= dwords) per vector
//   kGroup                query rows that share one unpacking of a tile; those of a larger group take turns
//   kAccumulators         integer accumulators that fit in registers beside tables and operands
//   kProbBase             a unit of the first byte of a probability of two, in those of the second
//   prob_bound<Largest>   what must fit a byte: probabilities, or sums of two, where sums of two products by levels up
//                         to Largest could saturate
//   kKeyOffset, kValueOffset  added to levels (128 where the dot product takes unsigned codes; level_offset() has the
//                         codecs that it is another for)
//   kAddsPairs            dot() goes by sums of pairs of products in 16 bits: where levels are small, dot_pairs() adds
//                         some of them there (of keys, of codes that are not negative), and widen() makes an end
//   kExpandsFrom          levels of trellis codes are looked up ahead of the products, and put into memory by
//                         store_vector() (expand.inl.h), where a unit has as many dwords, or more; 0: never
//   kOpenLines            packed lines that lane vectors may have in registers together (meet_units)
//   join_bits<A, B>       (a & A) | (b & B) in every byte, of masks that are apart
//   table_bytes, load_table  a codebook plus offset, laid out at compile time and held in registers
//   look_up<Bits, Pos>    level bytes of the field at bit Pos of every byte
//   look_up_128           level bytes of a table of 128, by bits 0..6 of every byte
//   negate_where<Bit>     -v where that bit of the other byte is set
//   negate_bytes          -v where the mask byte is 0xff, v where it is 0
//   dot<Side>             acc[lane] += sum of 4 level bytes x operand bytes; exact in int32
//   hadamard_in_lane<W>   butterfly stages with strides W/2 .. 1 (4 <= W <= kLanes; W = kLanes where that is less)
//   compress              (optional) stores the lanes whose bits are set, side by side, and anything behind them
//   kInterleaves          (optional, with the next three) e4m3 tiles are read in integers (kernels/e4m3.inl.h)
//   interleave<Half>      half of the vectors whose lanes are four bytes, one of each row
//   restore_order         puts lanes of all four into the order of those bytes
//   load_first_bytes      the first n bytes, of 64; zeros behind them
//   load_repeated<W>      W floats, over and over
//   max_size              the larger of a number without a sign and the size of another; a NaN may get lost
//   max_bits              the larger of two numbers without a sign; a NaN is larger than any
//   reduce_max_bits       the largest lane in that order
//   equal_lanes           a bit for each lane where a == b
//   greater_lanes         not 0 where in some lane a > b
//   look_up_8             entry n of a table of 8 floats, for n in 0..7
//   reduce_16             the sum of 16 lanes in the format's order
//   count_where_greater   n + (a > b ? 1 : 0)
//   store_signed          bytes middle + n, or middle - 1 - n where the sign bit of the float is set
//   store_operand         kLanes whole numbers (a quantized query or probabilities) from depth `at` of an operand, as
//                         dot() wants them
//   store_tile<kSigned>   64 bytes of operands, of floats from 0 to 255 or, signed, from -128 to 127, truncated
//   load_int8             kLanes int8 as floats
//   reduce_max_4, reduce_add_4  four vectors at once
//   add_to_exponent       the lowest bits of the second float, as a whole number, to the exponent of the first
//   fraction              (with the next) how far a float lies above the whole number below it; 0 for infinities
//   scale_by_power        (optional) the first float times 2^n, n the whole number below the second; denormals by mode
//   load_element<dtype>   kLanes elements as floats; e4m3: in units of kE4m3Unit, subnormals whatever the mode
//   load_two_e4m3         (optional) the same of two vectors, side by side
//   store_int16           floats below 2^31, rounded half to even, cut off at the range of int16
//
// and in W16, for the search of the trellis codecs, kLanes 16-bit integers in a vector V:
//
//   load, store           on multiples of 2 kLanes bytes
//   splat, splat_pair     one integer in every lane; splat_pair takes it twice, in the halves of a dword
//   add_saturated, sub_saturated  signed; add_unsigned saturates unsigned, sub wraps, min is unsigned
//   square                (v * v + 2^14) >> 15, of a signed v; the square of -32768 is 32768
//   clear_low<Bits>, set_low<Bits>  low bits to 0 or to n
//   push<Shift, Bits>     word << Shift | low bits of v
#pragma once
#include <cmath>
#include <cstring>

#include "kvpack/types.h"
#include "simd/half.h"

namespace {

struct Scalar {
  using I = uint32_t;
  using F = float;
  using Code = uint32_t;
  // One row at a time: code for four would be most of what there is to compile.
  static constexpr int kLanes = 1, kGroup = 1, kAccumulators = 4, kProbBase = 256, kKeyOffset = 0, kValueOffset = 0,
                       kOpenLines = 1;
  static constexpr bool kAddsPairs = false;
  static constexpr int kExpandsFrom = 0;

  static I load_bytes(const uint8_t* p) {
    I v;
    std::memcpy(&v, p, 4);
    return v;
  }
  static I splat(int32_t v) { return static_cast<I>(v); }
  static I shift_right_16(I v, int n) { return ((v & 0xffffU) >> n) | (((v >> 16) >> n) << 16); }
  template <int Mask>
  static I select_bits(I a, I b) {
    constexpr I m = 0x01010101U * static_cast<I>(Mask);
    return (a & m) | (b & ~m);
  }
  template <int A, int B>
  static I join_bits(I a, I b) {
    return (a & 0x01010101U * A) | (b & 0x01010101U * B);
  }

  struct TableBytes {
    int8_t level[16];
  };
  template <int Bits>
  using Table = TableBytes;
  template <int Bits>
  static constexpr TableBytes table_bytes(const int8_t* level, int offset) {
    TableBytes t{};
    for (int i = 0; i < (1 << Bits); ++i) t.level[i] = static_cast<int8_t>(level[i] + offset);
    return t;
  }
  template <int Bits>
  static Table<Bits> load_table(const TableBytes& t) {
    return t;
  }
  template <int Bits, int Pos>
  static I look_up(const Table<Bits>& t, I raw) {
    I out = 0;
    for (int e = 0; e < 4; ++e) {
      const uint32_t field = (raw >> (8 * e + Pos)) & ((1U << Bits) - 1);
      out |= static_cast<I>(static_cast<uint8_t>(t.level[field])) << (8 * e);
    }
    return out;
  }
  static I shift_left_16(I v, int n) { return ((v & 0xffffU) << n & 0xffffU) | ((v >> 16) << n) << 16; }
  static I rotate_dwords_8(I v) { return v << 8 | v >> 24; }
  static I exclusive_or(I a, I b) { return a ^ b; }
  static I add_bytes(I a, I b) { return ((a & 0x7f7f7f7fU) + (b & 0x7f7f7f7fU)) ^ ((a ^ b) & 0x80808080U); }
  using Table128 = const int8_t*;
  static Table128 load_table_128(const int8_t* level) { return level; }
  static I look_up_128(Table128 t, I raw) {
    I out = 0;
    for (int e = 0; e < 32; e += 8) out |= static_cast<I>(static_cast<uint8_t>(t[(raw >> e) & 0x7fU])) << e;
    return out;
  }
  template <int Bit>
  static I negate_where(I v, I signs) {
    return negate_bytes(v, ((signs >> Bit) & 0x01010101U) * 0xffU);
  }
  static I flip_sign_bit(I v) { return v ^ 0x80808080U; }
  static I negate_bytes(I v, I mask) {
    I out = 0;
    for (int e = 0; e < 32; e += 8) {
      const uint32_t m = (mask >> e) & 0xffU;
      out |= ((((v >> e) ^ m) - m) & 0xffU) << e;
    }
    return out;
  }
  static Code expand(I levels) { return levels; }

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
  template <kvpack::Side S>
  static I dot(I acc, Code code, const int32_t* operand) {
    const auto w = static_cast<uint32_t>(*operand);
    int32_t sum = 0;
    for (int e = 0; e < 4; ++e) {
      const auto c = static_cast<int32_t>(static_cast<int8_t>(code >> (8 * e)));
      const auto byte = static_cast<uint8_t>(w >> (8 * e));
      sum +=
          c * (S == kvpack::Side::key ? static_cast<int32_t>(static_cast<int8_t>(byte)) : static_cast<int32_t>(byte));
    }
    return acc + static_cast<I>(sum);
  }

  static F load(const float* p) { return *p; }
  static F load_int8(const int8_t* p) { return *p; }
  template <int>
  static F load_repeated(const float* p) {
    return load(p);
  }
  static void store(float* p, F v) { *p = v; }
  static F set1(float v) { return v; }
  static F zero() { return 0.0F; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return std::fma(a, b, c); }
  static F div(F a, F b) { return a / b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F max_size(F a, F b) { return max(a, abs(b)); }
  static F max_bits(F a, F b) { return float_bits(a) > float_bits(b) ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F abs(F a) { return std::fabs(a); }
  static F copy_sign(F magnitude, F sign) { return std::copysign(magnitude, sign); }
  static F round_even(F a) { return std::nearbyint(a); }
  static F truncate(F a) { return std::trunc(a); }
  static F to_float(I v) { return static_cast<float>(static_cast<int32_t>(v)); }
  static F add_to_exponent(F a, F n) { return bits_float(float_bits(a) + (float_bits(n) << 23)); }
  static I count_where_greater(I n, F a, F b) { return a > b ? n + 1 : n; }
  static F zero_where_less(F v, F a, F b) { return a < b ? 0.0F : v; }
  static F look_up_8(const float* table, I n) { return table[n]; }
  // The format's order: l + (l + 8), then 4, 2, 1.
  static float reduce_16(const F (&part)[16]) {
    float l[16];
    std::memcpy(l, part, sizeof l);
    for (int step = 8; step >= 1; step /= 2)
      for (int i = 0; i < step; ++i) l[i] = l[i] + l[i + step];
    return l[0];
  }
  static float reduce_max(F v) { return v; }
  static float reduce_max_bits(F v) { return v; }
  static uint32_t equal_lanes(F a, F b) { return a == b ? 1 : 0; }
  static uint32_t greater_lanes(F a, F b) { return a > b ? 1 : 0; }
  static float reduce_add(F v) { return v; }
  template <int>
  static F hadamard_in_lane(F v) {
    return v;
  }
  static void store_low_bytes(uint8_t* p, F v) { *p = static_cast<uint8_t>(static_cast<int32_t>(v)); }
  static void store_signed(uint8_t* p, I n, F sign, int32_t middle) {
    *p = static_cast<uint8_t>(static_cast<I>(middle) + (std::signbit(sign) ? ~n : n));
  }
  static void reduce_add_4(F a, F b, F c, F d, float* out) {
    out[0] = a;
    out[1] = b;
    out[2] = c;
    out[3] = d;
  }
  static void reduce_max_4(F a, F b, F c, F d, float* out) { reduce_add_4(a, b, c, d, out); }
  static void prefetch(const uint8_t*) {}

  static void store_int16(int16_t* p, F v) {
    *p = static_cast<int16_t>(std::nearbyint(v < -32768.0F ? -32768.0F : v > 32767.0F ? 32767.0F : v));
  }

  // Eight lanes in a vector of the compiler's, which becomes whatever the baseline of the machine has.
  struct W16 {
    typedef uint16_t V __attribute__((vector_size(16)));
    typedef int16_t Signed __attribute__((vector_size(16)));
    typedef int32_t Wide __attribute__((vector_size(32)));
    static constexpr int kLanes = 8;
    static Signed as_signed(V v) { return (Signed)v; }
    static V mask(Signed v) { return (V)v; }  // of a comparison
    static V load(const void* p) {
      V v;
      std::memcpy(&v, p, sizeof v);
      return v;
    }
    static void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
    static V splat(int n) { return V{} + static_cast<uint16_t>(n); }
    static V splat_pair(int32_t pair) { return splat(pair); }
    // Where the sign of the result is wrong: the end of the range on the side of a.
    static V saturate(V result, V wrong, V a) {
      const V end = (a >> 15) + static_cast<uint16_t>(0x7fff);
      const V over = mask(as_signed(wrong) < 0);
      return (result & ~over) | (end & over);
    }
    static V add_saturated(V a, V b) { return saturate(a + b, (a ^ (a + b)) & (b ^ (a + b)), a); }
    static V sub_saturated(V a, V b) { return saturate(a - b, (a ^ b) & (a ^ (a - b)), a); }
    static V add_unsigned(V a, V b) { return (a + b) | mask(a + b < a); }
    static V sub(V a, V b) { return a - b; }
    static V min(V a, V b) {
      const V less = mask(a < b);
      return (a & less) | (b & ~less);
    }
    static V square(V a) {
      const Wide wide = __builtin_convertvector(as_signed(a), Wide);
      return __builtin_convertvector((wide * wide + 0x4000) >> 15, V);
    }
    template <int Bits>
    static V clear_low(V v) {
      return v & static_cast<uint16_t>(-1 << Bits);
    }
    template <int Bits>
    static V set_low(V v, int n) {
      return clear_low<Bits>(v) | static_cast<uint16_t>(n);
    }
    template <int Shift, int Bits>
    static V push(V word, V v) {
      return word << Shift | (v & static_cast<uint16_t>((1 << Bits) - 1));
    }
  };

  template <kvpack::Dtype T>
  static F load_element(const uint8_t* p) {
    if constexpr (T == kvpack::Dtype::f32) {
      float v;
      std::memcpy(&v, p, 4);
      return v;
    } else if constexpr (T == kvpack::Dtype::e4m3) {
      return half_to_float(e4m3_to_half(*p));
    } else {
      uint16_t bits;
      std::memcpy(&bits, p, 2);
      return T == kvpack::Dtype::f16 ? half_to_float(bits) : bfloat_to_float(bits);
    }
  }
};

}  // namespace
