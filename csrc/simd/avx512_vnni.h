// Policies "avx512_vnni" (AVX-512 F, BW, DQ, VL, VNNI) and "avx512_vbmi" (the same with VBMI's vpermb). 16 lanes.
// What a policy provides is described in scalar.h.
#pragma once
#include <immintrin.h>

#include "kvpack/types.h"
#include "simd/half.h"

namespace {

struct Avx512Vnni {
  using I = __m512i;
  using F = __m512;
  using Code = __m512i;
  static constexpr int kLanes = 16, kGroup = 4, kAccumulators = 16, kProbBase = 256, kKeyOffset = 128, kValueOffset = 0,
                       kOpenLines = 16;
  static constexpr bool kAddsPairs = false;
  static constexpr int kExpandsFrom = 1;

  static I load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store_vector(uint8_t* p, I v) { _mm512_storeu_si512(p, v); }
  static I splat(int32_t v) { return _mm512_set1_epi32(v); }
  static I shift_right_16(I v, int n) { return _mm512_srli_epi16(v, static_cast<unsigned>(n)); }
  template <int Mask>
  static I select_bits(I a, I b) {
    // The mask last: it is read from memory, where GCC copies whatever comes first.
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi8(static_cast<char>(Mask)), 0xE4);
  }

  template <int A, int B>
  static I join_bits(I a, I b) {
    return select_bits<A>(a, _mm512_and_si512(b, _mm512_set1_epi8(B)));
  }

  // 16-byte look-up in every 128-bit lane; the field is shifted down and masked.
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
    return {_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(t.level)))};
  }
  template <int Bits, int Pos>
  static I look_up(const Table<Bits>& t, I raw) {
    const I field = Pos == 0 ? raw : _mm512_srli_epi16(raw, Pos);
    return _mm512_shuffle_epi8(t.level, _mm512_and_si512(field, _mm512_set1_epi8((1 << Bits) - 1)));
  }
  static I shift_left_16(I v, int n) { return _mm512_slli_epi16(v, static_cast<unsigned>(n)); }
  static I rotate_dwords_8(I v) { return _mm512_rol_epi32(v, 8); }
  static I exclusive_or(I a, I b) { return _mm512_xor_si512(a, b); }
  static I add_bytes(I a, I b) { return _mm512_add_epi8(a, b); }
  // Eight shuffles by the low nibble, half of them merging by bit 4, and three blends.
  struct Table128 {
    I part[8];
  };
  static Table128 load_table_128(const int8_t* level) {
    Table128 t;
    for (int i = 0; i < 8; ++i)
      t.part[i] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(level + 16 * i)));
    return t;
  }
  [[gnu::always_inline]] static I look_up_128(const Table128& t, I raw) {
    const I low = _mm512_and_si512(raw, _mm512_set1_epi8(0x0f));
    const auto bit = [raw](int n) { return _mm512_test_epi8_mask(raw, _mm512_set1_epi8(static_cast<char>(1 << n))); };
    const __mmask64 bit4 = bit(4), bit5 = bit(5);
    const auto pair = [&](int i) {
      return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(t.part[i], low), bit4, t.part[i + 1], low);
    };
    return _mm512_mask_blend_epi8(bit(6), _mm512_mask_blend_epi8(bit5, pair(0), pair(2)),
                                  _mm512_mask_blend_epi8(bit5, pair(4), pair(6)));
  }
  template <int Bit>
  static I negate_where(I v, I signs) {
    const __mmask64 where = Bit == 7 ? _mm512_movepi8_mask(signs)
                                     : _mm512_test_epi8_mask(signs, _mm512_set1_epi8(static_cast<char>(1 << Bit)));
    return _mm512_mask_sub_epi8(v, where, _mm512_setzero_si512(), v);
  }
  static I flip_sign_bit(I v) { return _mm512_xor_si512(v, _mm512_set1_epi8(static_cast<char>(0x80))); }
  static I negate_bytes(I v, I mask) { return _mm512_sub_epi8(_mm512_xor_si512(v, mask), mask); }
  static Code expand(I levels) { return levels; }

  static void store_operand(int32_t* operand, int at, F v) {
    store_low_bytes(reinterpret_cast<uint8_t*>(operand) + at, v);
  }
  template <bool Signed = false>
  static void store_tile(int32_t* operand, const F (&v)[4]) {
    const I low = _mm512_packs_epi32(_mm512_cvttps_epi32(v[0]), _mm512_cvttps_epi32(v[1]));
    const I high = _mm512_packs_epi32(_mm512_cvttps_epi32(v[2]), _mm512_cvttps_epi32(v[3]));
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const I bytes = Signed ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
    _mm512_storeu_si512(operand, _mm512_permutexvar_epi32(order, bytes));
  }
  template <int>
  static F prob_bound(F v) {
    return v;
  }
  // Through asm with GCC, which otherwise copies every accumulator once per step and spills some of them.
  [[gnu::always_inline]] static I dpbusd(I acc, I unsigned_bytes, I signed_bytes) {
#if defined(__GNUC__) && !defined(__clang__)
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(unsigned_bytes), "v"(signed_bytes));
    return acc;
#else
    return _mm512_dpbusd_epi32(acc, unsigned_bytes, signed_bytes);
#endif
  }
  template <kvpack::Side S>
  static I dot(I acc, Code code, const int32_t* operand) {
    const I w = _mm512_set1_epi32(*operand);
    return S == kvpack::Side::key ? dpbusd(acc, code, w) : dpbusd(acc, w, code);
  }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  template <int Width>
  static F load_repeated(const float* p) {
    if constexpr (Width == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    if constexpr (Width == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
    return load(p);
  }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static void compress(float* p, F v, uint32_t mask) {
    store(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), v));
  }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F zero() { return _mm512_setzero_ps(); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F max_size(F a, F b) { return _mm512_range_ps(a, b, 0x0b); }
  static F max_bits(F a, F b) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F copy_sign(F magnitude, F sign) {
    const I bit = _mm512_set1_epi32(static_cast<int>(0x80000000U));
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign), _mm512_castps_si512(magnitude), 0xCA));
  }
  static F round_even(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F truncate(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static F add_to_exponent(F a, F n) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
  }
  static F fraction(F v) { return _mm512_reduce_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static F scale_by_power(F v, F n) { return _mm512_scalef_ps(v, n); }
  static I count_where_greater(I n, F a, F b) {
    return _mm512_mask_sub_epi32(n, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), n, _mm512_set1_epi32(-1));
  }
  static F zero_where_less(F v, F a, F b) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), v); }
  static F look_up_8(const float* table, I n) {
    return _mm512_permutexvar_ps(n, _mm512_castps256_ps512(_mm256_loadu_ps(table)));
  }
  // As look_up_8, of 16 entries; a level that has it says so.
  static constexpr bool kLookUp16 = true;
  static I truncate_to_int(F n) { return _mm512_cvttps_epi32(n); }
  static F look_up_16(const float* table, I n) { return _mm512_permutexvar_ps(n, _mm512_load_ps(table)); }
  static I look_up_16(const int32_t* table, I n) { return _mm512_permutexvar_epi32(n, _mm512_load_si512(table)); }
  static float reduce_16(const F (&part)[1]) {
    const __m256 eight = fold(part[0]);
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  static float reduce_max(F v) { return _mm512_reduce_max_ps(v); }
  static float reduce_max_bits(F v) {
    return bits_float(static_cast<uint32_t>(_mm512_reduce_max_epi32(_mm512_castps_si512(v))));
  }
  static uint32_t equal_lanes(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static uint32_t greater_lanes(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static float reduce_add(F v) { return _mm512_reduce_add_ps(v); }
  // Strides 8, 4, 2, 1: the partner's value plus or minus our own. The multiplication by +-1 is exact.
  template <int Width>
  static F hadamard_in_lane(F v) {
    const F p = _mm512_set1_ps(1.0F), n = _mm512_set1_ps(-1.0F);
    if constexpr (Width > 8)
      v = _mm512_fmadd_ps(v, _mm512_mask_blend_ps(0xff00, p, n), _mm512_shuffle_f32x4(v, v, 0x4E));
    if constexpr (Width > 4)
      v = _mm512_fmadd_ps(v, _mm512_mask_blend_ps(0xf0f0, p, n), _mm512_shuffle_f32x4(v, v, 0xB1));
    v = _mm512_fmadd_ps(v, _mm512_mask_blend_ps(0xcccc, p, n), _mm512_permute_ps(v, 0x4E));
    return _mm512_fmadd_ps(v, _mm512_mask_blend_ps(0xaaaa, p, n), _mm512_permute_ps(v, 0xB1));
  }
  static void store_low_bytes(uint8_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(v)));
  }
  static void store_signed(uint8_t* p, I n, F sign, int32_t middle) {
    const I all = _mm512_srai_epi32(_mm512_castps_si512(sign), 31);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_xor_si512(n, all), splat(middle))));
  }
  static __m256 fold(F v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
  static void reduce_add_4(F a, F b, F c, F d, float* out) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(fold(a), fold(b)), _mm256_hadd_ps(fold(c), fold(d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }
  static __m128 fold_max(F v) {
    const __m256 x = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  }
  static __m128 max_of_pairs(__m128 a, __m128 b) { return _mm_max_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b)); }
  static void reduce_max_4(F a, F b, F c, F d, float* out) {
    const __m128 ab = max_of_pairs(fold_max(a), fold_max(b)), cd = max_of_pairs(fold_max(c), fold_max(d));
    _mm_storeu_ps(out, _mm_max_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
  }
  // Into L1: 3 to 8 % faster than into L2 on Zen 5 (cold tiles); on Zen 4 only L2 was measured.
  // Inlined before GCC finds that it has no effects, and drops its calls (tests/cpp/instructions.sh).
  [[gnu::always_inline]] static void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }

  static void store_int16(int16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
  }

  struct W16 {
    using V = __m512i;
    static constexpr int kLanes = 32;
    static V load(const void* p) { return _mm512_load_si512(p); }
    static void store(void* p, V v) { _mm512_store_si512(p, v); }
    static V splat(int n) { return _mm512_set1_epi16(static_cast<short>(n)); }
    static V splat_pair(int32_t pair) { return _mm512_set1_epi32(pair); }
    static V add_saturated(V a, V b) { return _mm512_adds_epi16(a, b); }
    static V sub_saturated(V a, V b) { return _mm512_subs_epi16(a, b); }
    static V add_unsigned(V a, V b) { return _mm512_adds_epu16(a, b); }
    static V sub(V a, V b) { return _mm512_sub_epi16(a, b); }
    static V min(V a, V b) { return _mm512_min_epu16(a, b); }
    static V square(V a) { return _mm512_mulhrs_epi16(a, a); }
    template <int Bits>
    static V clear_low(V v) {
      return _mm512_and_si512(v, splat(-1 << Bits));
    }
    template <int Bits>
    static V set_low(V v, int n) {
      return _mm512_ternarylogic_epi32(v, splat(-1 << Bits), splat(n), 0xEA);
    }
    template <int Shift, int Bits>
    static V push(V word, V v) {
      return _mm512_ternarylogic_epi32(v, splat((1 << Bits) - 1), _mm512_slli_epi16(word, Shift), 0xEA);
    }
  };

  template <kvpack::Dtype T>
  static F load_element(const uint8_t* p) {
    if constexpr (T == kvpack::Dtype::f32) return _mm512_loadu_ps(p);
    if constexpr (T == kvpack::Dtype::e4m3) {  // bit 7 is the sign, and stays above the exponent
      const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      return _mm512_cvtph_ps(
          _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbf80))));
    }
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (T == kvpack::Dtype::f16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
};

#ifdef __AVX512VBMI__
// vpermb looks at six index bits, so a field needs no mask: the table is replicated over the bits that are not its
// own. Fields that end within bit 5 need no shift either, only a table of their own.
struct Avx512Vbmi : Avx512Vnni {
  static constexpr int kExpandsFrom = 16;  // the code for all of a unit would not fit the instruction cache

  template <int Bits>
  struct TableBytes {
    alignas(64) int8_t at[6 / Bits][64];
  };
  template <int Bits>
  struct Table {
    I at[6 / Bits];
  };
  template <int Bits>
  static constexpr TableBytes<Bits> table_bytes(const int8_t* level, int offset) {
    TableBytes<Bits> t{};
    for (int k = 0; k < 6 / Bits; ++k)
      for (int i = 0; i < 64; ++i)
        t.at[k][i] = static_cast<int8_t>(level[(i >> (k * Bits)) & ((1 << Bits) - 1)] + offset);
    return t;
  }
  template <int Bits>
  static Table<Bits> load_table(const TableBytes<Bits>& b) {
    Table<Bits> t;
    for (int k = 0; k < 6 / Bits; ++k) t.at[k] = _mm512_load_si512(b.at[k]);
    return t;
  }
  template <int Bits, int Pos>
  static I look_up(const Table<Bits>& t, I raw) {
    if constexpr (Pos + Bits <= 6) return _mm512_permutexvar_epi8(raw, t.at[Pos / Bits]);
    return _mm512_permutexvar_epi8(_mm512_srli_epi16(raw, Pos), t.at[0]);
  }
  struct Table128 {
    I low, high;
  };
  static Table128 load_table_128(const int8_t* level) {
    return {_mm512_load_si512(level), _mm512_load_si512(level + 64)};
  }
  static I look_up_128(const Table128& t, I raw) { return _mm512_permutex2var_epi8(t.low, raw, t.high); }

  static constexpr bool kInterleaves = true;
  static I load_first_bytes(const uint8_t* p, int n) { return _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - n), p); }
  template <int Half>
  static void interleave(const I (&row)[4], I (&v)[2]) {
    const I a = Half == 0 ? _mm512_unpacklo_epi8(row[0], row[1]) : _mm512_unpackhi_epi8(row[0], row[1]);
    const I b = Half == 0 ? _mm512_unpacklo_epi8(row[2], row[3]) : _mm512_unpackhi_epi8(row[2], row[3]);
    v[0] = _mm512_unpacklo_epi16(a, b);
    v[1] = _mm512_unpackhi_epi16(a, b);
  }
  // Bytes were interleaved within blocks of 16: lane 4 b + i of vector v is that of byte 16 b + 4 v + i.
  static void restore_order(F (&v)[4]) {
    const F a = _mm512_shuffle_f32x4(v[0], v[1], 0x44), b = _mm512_shuffle_f32x4(v[2], v[3], 0x44);
    const F c = _mm512_shuffle_f32x4(v[0], v[1], 0xEE), d = _mm512_shuffle_f32x4(v[2], v[3], 0xEE);
    v[0] = _mm512_shuffle_f32x4(a, b, 0x88);
    v[1] = _mm512_shuffle_f32x4(a, b, 0xDD);
    v[2] = _mm512_shuffle_f32x4(c, d, 0x88);
    v[3] = _mm512_shuffle_f32x4(c, d, 0xDD);
  }
};
#endif

}  // namespace
