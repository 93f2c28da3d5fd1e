// Policy "avx_vnni" (AVX2 with AVX-VNNI): the byte dot products of AVX-512 VNNI on 8 lanes, for machines without
// AVX-512. It is avx2.h but for these: nothing saturates, and key levels are unsigned.
//
// Built with AVX-512's flags instead, the same instructions have their other encoding: so it is tested on machines that
// have only that one (KVPACK_EVEX_VNNI).
#pragma once
#include "simd/avx2.h"

namespace {

struct AvxVnni : Avx2 {
  static constexpr int kProbBase = 256, kKeyOffset = 128;
  static constexpr bool kAddsPairs = false;

  template <int>
  static F prob_bound(F v) {
    return v;
  }
  // Through asm with GCC, as in avx512_vnni.h.
  [[gnu::always_inline]] static I dpbusd(I acc, I unsigned_bytes, I signed_bytes) {
#if !defined(__AVXVNNI__)
    return _mm256_dpbusd_epi32(acc, unsigned_bytes, signed_bytes);
#elif defined(__GNUC__) && !defined(__clang__)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(unsigned_bytes), "x"(signed_bytes));
    return acc;
#else
    return _mm256_dpbusd_avx_epi32(acc, unsigned_bytes, signed_bytes);
#endif
  }
  template <kvpack::Side S>
  static I dot(I acc, Code code, const int32_t* operand) {
    const I w = _mm256_set1_epi32(*operand);
    return S == kvpack::Side::key ? dpbusd(acc, code, w) : dpbusd(acc, w, code);
  }
};

}  // namespace
