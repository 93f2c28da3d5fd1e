// Policy "avx2" (AVX2, FMA, F16C). 8 lanes. Products of unsigned with signed bytes are added in pairs, and saturate at
// 16 bits (vpmaddubsw). Of keys, it is the size that is multiplied, their sign goes to the query: a pair is at most
// 2 * 127 * 128. Probabilities have eight bits, but where levels are large no more than 255 in a pair, so that a pair
// is at most 255 * 128. vpmaddwd with ones adds pairs of pairs. Where levels are small, keys are codes without a sign,
// and as many pairs are added in 16 bits before that as fit (kernels/levels.inl.h). What a policy provides is described
// in scalar.h.
#pragma once
#include <immintrin.h>

#include "kvpack/types.h"
#include "simd/half.h"

namespace {

struct Avx2 {
  using I = __m256i;
  using F = __m256;
  using Code = __m256i;
  static constexpr int kLanes = 8, kGroup = 4, kAccumulators = 8, kProbBase = 128, kKeyOffset = 0, kValueOffset = 0,
                       kOpenLines = 1;
  static constexpr bool kAddsPairs = true;
  static constexpr int kExpandsFrom = 1;

  static I load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_vector(uint8_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static I splat(int32_t v) { return _mm256_set1_epi32(v); }
  static I shift_right_16(I v, int n) { return _mm256_srli_epi16(v, n); }
  template <int Mask>
  static I select_bits(I a, I b) {
    const I m = _mm256_set1_epi8(static_cast<char>(Mask));
    return _mm256_or_si256(_mm256_and_si256(a, m), _mm256_andnot_si256(m, b));
  }
  template <int A, int B>
  static I join_bits(I a, I b) {
    return _mm256_or_si256(_mm256_and_si256(a, _mm256_set1_epi8(A)), _mm256_and_si256(b, _mm256_set1_epi8(B)));
  }

  struct TableBytes {
    alignas(16) int8_t level[16];
  };
  template <int Bits>
  struct Table {
    I level;
  };
  template <int Bits>
  static constexpr TableBytes table_bytes(const int8_t* level, int offset) {
    TableBytes t{};
    for (int i = 0; i < 16; ++i) t.level[i] = static_cast<int8_t>(level[i & ((1 << Bits) - 1)] + offset);
    return t;
  }
  template <int Bits>
  static Table<Bits> load_table(const TableBytes& t) {
    return {_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t.level)))};
  }
  template <int Bits, int Pos>
  static I look_up(const Table<Bits>& t, I raw) {
    const I field = Pos == 0 ? raw : _mm256_srli_epi16(raw, Pos);
    return _mm256_shuffle_epi8(t.level, _mm256_and_si256(field, _mm256_set1_epi8((1 << Bits) - 1)));
  }
  static I shift_left_16(I v, int n) { return _mm256_slli_epi16(v, n); }
  static I rotate_dwords_8(I v) { return _mm256_or_si256(_mm256_slli_epi32(v, 8), _mm256_srli_epi32(v, 24)); }
  static I exclusive_or(I a, I b) { return _mm256_xor_si256(a, b); }
  static I add_bytes(I a, I b) { return _mm256_add_epi8(a, b); }
  // Eight shuffles by the low nibble, seven blends by bits 4, 5 and 6, each shifted to the top.
  struct Table128 {
    I part[8];
  };
  static Table128 load_table_128(const int8_t* level) {
    Table128 t;
    for (int i = 0; i < 8; ++i)
      t.part[i] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(level + 16 * i)));
    return t;
  }
  [[gnu::always_inline]] static I look_up_128(const Table128& t, I raw) {
    const I low = _mm256_and_si256(raw, _mm256_set1_epi8(0x0f));
    const I bit6 = _mm256_add_epi8(raw, raw), bit5 = _mm256_add_epi8(bit6, bit6), bit4 = _mm256_add_epi8(bit5, bit5);
    const auto pair = [&](int i) {
      return _mm256_blendv_epi8(_mm256_shuffle_epi8(t.part[i], low), _mm256_shuffle_epi8(t.part[i + 1], low), bit4);
    };
    return _mm256_blendv_epi8(_mm256_blendv_epi8(pair(0), pair(2), bit5), _mm256_blendv_epi8(pair(4), pair(6), bit5),
                              bit6);
  }
  template <int Bit>
  static I negate_where(I v, I signs) {
    const I top = Bit == 7 ? signs : shift_left_16(signs, 7 - Bit);
    return _mm256_sign_epi8(v, _mm256_or_si256(top, _mm256_set1_epi8(1)));
  }
  static I flip_sign_bit(I v) { return _mm256_xor_si256(v, _mm256_set1_epi8(static_cast<char>(0x80))); }
  static I negate_bytes(I v, I mask) { return _mm256_sub_epi8(_mm256_xor_si256(v, mask), mask); }
  static Code expand(I levels) { return levels; }

  static void store_operand(int32_t* operand, int at, F v) {
    store_low_bytes(reinterpret_cast<uint8_t*>(operand) + at, v);
  }
  template <bool Signed = false>
  static void store_tile(int32_t* operand, const F (&v)[8]) {
    const I order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int n = 0; n < 2; ++n) {
      const F* four = v + 4 * n;
      const I low = _mm256_packs_epi32(_mm256_cvttps_epi32(four[0]), _mm256_cvttps_epi32(four[1]));
      const I high = _mm256_packs_epi32(_mm256_cvttps_epi32(four[2]), _mm256_cvttps_epi32(four[3]));
      const I bytes = Signed ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(operand + 8 * n), _mm256_permutevar8x32_epi32(bytes, order));
    }
  }
  template <int Largest>
  static F prob_bound(F v) {
    return 2 * 0xff * Largest <= 0x7fff ? v : _mm256_add_ps(v, _mm256_permute_ps(v, 0xB1));
  }
  // Through asm with GCC, which otherwise loads the operands of several vectors ahead and spills them, and sums too
  // (hot, score and accumulate of tq3 take 20 % longer, of q5_0 25 %, of tq1 70 %).
  template <kvpack::Side S>
  [[gnu::always_inline]] static I dot(I acc, Code levels, const int32_t* operand) {
    const I ones = _mm256_set1_epi16(1);
    [[maybe_unused]] const I sizes = _mm256_abs_epi8(levels);
#if defined(__GNUC__) && !defined(__clang__)
    I t;
    if constexpr (S == kvpack::Side::key)
      asm("vpbroadcastd %[w], %[t]\n\tvpsignb %[levels], %[t], %[t]\n\tvpmaddubsw %[t], %[sizes], %[t]\n\t"
          "vpmaddwd %[ones], %[t], %[t]\n\tvpaddd %[t], %[acc], %[acc]"
          : [acc] "+x"(acc), [t] "=&x"(t)
          : [w] "m"(*operand), [levels] "x"(levels), [sizes] "x"(sizes), [ones] "x"(ones));
    else
      asm("vpbroadcastd %[w], %[t]\n\tvpmaddubsw %[levels], %[t], %[t]\n\tvpmaddwd %[ones], %[t], %[t]\n\t"
          "vpaddd %[t], %[acc], %[acc]"
          : [acc] "+x"(acc), [t] "=&x"(t)
          : [w] "m"(*operand), [levels] "x"(levels), [ones] "x"(ones));
    return acc;
#else
    const I w = _mm256_set1_epi32(*operand);
    const I pairs = S == kvpack::Side::key ? _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(w, levels))
                                           : _mm256_maddubs_epi16(w, levels);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, ones));
#endif
  }

  template <kvpack::Side S>
  [[gnu::always_inline]] static I dot_pairs(I pairs, Code code, const int32_t* operand) {
#if defined(__GNUC__) && !defined(__clang__)
    I t;
    if constexpr (S == kvpack::Side::key)
      asm("vpbroadcastd %[w], %[t]\n\tvpmaddubsw %[t], %[code], %[t]\n\tvpaddw %[t], %[pairs], %[pairs]"
          : [pairs] "+x"(pairs), [t] "=&x"(t)
          : [w] "m"(*operand), [code] "x"(code));
    else
      asm("vpbroadcastd %[w], %[t]\n\tvpmaddubsw %[code], %[t], %[t]\n\tvpaddw %[t], %[pairs], %[pairs]"
          : [pairs] "+x"(pairs), [t] "=&x"(t)
          : [w] "m"(*operand), [code] "x"(code));
    return pairs;
#else
    const I w = _mm256_set1_epi32(*operand);
    return _mm256_add_epi16(pairs,
                            S == kvpack::Side::key ? _mm256_maddubs_epi16(code, w) : _mm256_maddubs_epi16(w, code));
#endif
  }
  static I widen(I acc, I pairs) { return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); }

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load_int8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  template <int Width>
  static F load_repeated(const float* p) {
    if constexpr (Width == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
    return load(p);
  }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  // The lanes that are set in a byte, ascending.
  struct SetLanes {
    alignas(64) uint8_t at[256][8];
    constexpr SetLanes() : at{} {
      for (int mask = 0; mask < 256; ++mask)
        for (int i = 0, n = 0; i < 8; ++i)
          if ((mask >> i & 1) != 0) at[mask][n++] = static_cast<uint8_t>(i);
    }
  };
  static void compress(float* p, F v, uint32_t mask) {
    static constexpr SetLanes kSetLanes{};
    const I lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSetLanes.at[mask])));
    store(p, _mm256_permutevar8x32_ps(v, lanes));
  }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static F zero() { return _mm256_setzero_ps(); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F max_size(F a, F b) { return max(a, abs(b)); }
  static F max_bits(F a, F b) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F sign_bit() { return _mm256_set1_ps(-0.0F); }
  static F abs(F a) { return _mm256_andnot_ps(sign_bit(), a); }
  static F copy_sign(F magnitude, F sign) {
    return _mm256_or_ps(_mm256_andnot_ps(sign_bit(), magnitude), _mm256_and_ps(sign_bit(), sign));
  }
  static F round_even(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F truncate(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static F add_to_exponent(F a, F n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
  }
  static I count_where_greater(I n, F a, F b) {
    return _mm256_sub_epi32(n, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
  }
  static F zero_where_less(F v, F a, F b) { return _mm256_and_ps(v, _mm256_cmp_ps(a, b, _CMP_NLT_UQ)); }
  static F look_up_8(const float* table, I n) { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), n); }
  static float reduce_16(const F (&part)[2]) {
    const F eight = _mm256_add_ps(part[0], part[1]);
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  static float reduce_max(F v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  static float reduce_max_bits(F v) {
    const I all = _mm256_castps_si256(v);
    __m128i x = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4E));
    return bits_float(static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xB1)))));
  }
  static uint32_t equal_lanes(F a, F b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
  }
  static uint32_t greater_lanes(F a, F b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
  }
  static float reduce_add(F v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  template <int Width>
  static F hadamard_in_lane(F v) {
    if constexpr (Width > 4)
      v = _mm256_fmadd_ps(v, _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), _mm256_permute2f128_ps(v, v, 1));
    v = _mm256_fmadd_ps(v, _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1), _mm256_permute_ps(v, 0x4E));
    return _mm256_fmadd_ps(v, _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_permute_ps(v, 0xB1));
  }
  static void store_bytes(uint8_t* p, I x) {  // of dwords in 0..255
    const __m128i w = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(w, w));
  }
  static void store_low_bytes(uint8_t* p, F v) {
    store_bytes(p, _mm256_and_si256(_mm256_cvttps_epi32(v), _mm256_set1_epi32(0xff)));
  }
  static void store_signed(uint8_t* p, I n, F sign, int32_t middle) {
    const I all = _mm256_srai_epi32(_mm256_castps_si256(sign), 31);
    store_bytes(p, _mm256_add_epi32(_mm256_xor_si256(n, all), splat(middle)));
  }
  static void reduce_add_4(F a, F b, F c, F d, float* out) {
    const F s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }
  static __m128 fold_max(F v) { return _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
  static __m128 max_of_pairs(__m128 a, __m128 b) { return _mm_max_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b)); }
  static void reduce_max_4(F a, F b, F c, F d, float* out) {
    const __m128 ab = max_of_pairs(fold_max(a), fold_max(b)), cd = max_of_pairs(fold_max(c), fold_max(d));
    _mm_storeu_ps(out, _mm_max_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
  }
  // Inlined before GCC finds that it has no effects, and drops its calls (tests/cpp/instructions.sh).
  [[gnu::always_inline]] static void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
  }

  static void store_int16(int16_t* p, F v) {
    const I x = _mm256_cvtps_epi32(v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
  }

  struct W16 {
    using V = __m256i;
    static constexpr int kLanes = 16;
    static V load(const void* p) { return _mm256_load_si256(static_cast<const V*>(p)); }
    static void store(void* p, V v) { _mm256_store_si256(static_cast<V*>(p), v); }
    static V splat(int n) { return _mm256_set1_epi16(static_cast<short>(n)); }
    static V splat_pair(int32_t pair) { return _mm256_set1_epi32(pair); }
    static V add_saturated(V a, V b) { return _mm256_adds_epi16(a, b); }
    static V sub_saturated(V a, V b) { return _mm256_subs_epi16(a, b); }
    static V add_unsigned(V a, V b) { return _mm256_adds_epu16(a, b); }
    static V sub(V a, V b) { return _mm256_sub_epi16(a, b); }
    static V min(V a, V b) { return _mm256_min_epu16(a, b); }
    static V square(V a) { return _mm256_mulhrs_epi16(a, a); }
    template <int Bits>
    static V clear_low(V v) {
      return _mm256_and_si256(v, splat(-1 << Bits));
    }
    template <int Bits>
    static V set_low(V v, int n) {
      return _mm256_or_si256(clear_low<Bits>(v), splat(n));
    }
    template <int Shift, int Bits>
    static V push(V word, V v) {
      return _mm256_or_si256(_mm256_slli_epi16(word, Shift), _mm256_and_si256(v, splat((1 << Bits) - 1)));
    }
  };

  template <kvpack::Dtype T>
  static F load_element(const uint8_t* p) {
    if constexpr (T == kvpack::Dtype::f32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    if constexpr (T == kvpack::Dtype::e4m3) {  // bit 7 is the sign, and stays above the exponent
      const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
      return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<short>(0xbf80))));
    }
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (T == kvpack::Dtype::f16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static void load_two_e4m3(const uint8_t* p, F& first, F& second) {
    const I wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const I half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    first = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
    second = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
  }
};

}  // namespace
