// Unnormalised Hadamard transform of d = m * 2^a values, index r * 2^a + c: first the fast Walsh-Hadamard transform
// along c, strides 2^(a-1), ..., 2, 1: (a, b) -> (a + b, a - b); then, where m is not 1, H_m along r, its terms added
// one after the other.
//
// The order is part of the format: encoders on every level must round alike. The vector stays in registers; strides
// below the lane count are shuffles inside a register.
#pragma once
#include "kernels/hadamard.h"
#include "kernels/table.h"

namespace {

template <int D>
const kvpack::HadamardSigns<D>& hadamard_signs() {
  static_assert(kvpack::hadamard_order(D) != 1);
  if constexpr (D == 48) return kvpack::kHadamard48;
  if constexpr (D == 80) return kvpack::kHadamard80;
  if constexpr (D == 96) return kvpack::kHadamard96;
  if constexpr (D == 112) return kvpack::kHadamard112;
  if constexpr (D == 144) return kvpack::kHadamard144;
  if constexpr (D == 160) return kvpack::kHadamard160;
  if constexpr (D == 192) return kvpack::kHadamard192;
}

// H_m (or its transpose) along r: row s meets all rows of the result at once, with the signs of column s. Products
// with 1 and -1 are exact, so that an FMA rounds like an addition; one lane is spared the call that it may be.
template <class S, int D, bool Transpose>
[[gnu::always_inline]] inline void hadamard_rows(typename S::F (&v)[D / S::kLanes]) {
  using F = typename S::F;
  constexpr int kVectors = D / S::kLanes, kOrder = kvpack::hadamard_order(D), kRow = D / kOrder;
  constexpr int kParts = kRow > S::kLanes ? kRow / S::kLanes : 1;  // vectors of a row
  alignas(64) float x[D];
  for (int i = 0; i < kVectors; ++i) S::store(x + i * S::kLanes, v[i]);
  const auto& signs = Transpose ? hadamard_signs<D>().transposed : hadamard_signs<D>().forward;
  for (int s = 0; s < kOrder; ++s) {
    F row[kParts];
    for (int i = 0; i < kParts; ++i)
      row[i] = S::template load_repeated<(kRow < S::kLanes ? kRow : S::kLanes)>(x + s * kRow + i * S::kLanes);
    for (int i = 0; i < kVectors; ++i) {
      const F sign = S::load(signs[s] + i * S::kLanes);
      if (s == 0 || S::kLanes == 1)
        v[i] = s == 0 ? S::mul(sign, row[i % kParts]) : S::add(v[i], S::mul(sign, row[i % kParts]));
      else
        v[i] = S::fma(sign, row[i % kParts], v[i]);
    }
  }
}

template <class S, int D, bool Transpose = false>
[[gnu::always_inline]] inline void hadamard(typename S::F (&v)[D / S::kLanes]) {
  constexpr int kVectors = D / S::kLanes, kRow = D / kvpack::hadamard_order(D);
  for (int stride = kRow / S::kLanes / 2; stride >= 1; stride /= 2)
    for (int i = 0; i < kVectors; ++i)
      if ((i & stride) == 0) {
        const auto a = v[i], b = v[i + stride];
        v[i] = S::add(a, b);
        v[i + stride] = S::sub(a, b);
      }
  for (int i = 0; i < kVectors; ++i) v[i] = S::template hadamard_in_lane<(kRow < S::kLanes ? kRow : S::kLanes)>(v[i]);
  if constexpr (kRow != D) hadamard_rows<S, D, Transpose>(v);
}

// Calls run.template operator()<D>() for the head sizes of the format, and the parts of split codecs.
template <class Run>
auto for_head_dim(int head_dim, Run&& run) {
  switch (head_dim) {
    case 16: return run.template operator()<16>();
    case 32: return run.template operator()<32>();
    case 48: return run.template operator()<48>();
    case 64: return run.template operator()<64>();
    case 80: return run.template operator()<80>();
    case 96: return run.template operator()<96>();
    case 112: return run.template operator()<112>();
    case 144: return run.template operator()<144>();
    case 160: return run.template operator()<160>();
    case 192: return run.template operator()<192>();
    case 128: return run.template operator()<128>();
    default: return run.template operator()<256>();
  }
}

// Orthonormal randomized Hadamard: forward H(s x)/sqrt(d), inverse s H^T(y)/sqrt(d).
template <class S>
void rotate(float* x, int64_t rows, int32_t head_dim, const float* signs, bool inverse) {
  for_head_dim(head_dim, [&]<int D>() {
    constexpr int kVectors = D / S::kLanes;
    const auto norm = S::set1(static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(D))));
    for (int64_t r = 0; r < rows; ++r, x += D) {
      typename S::F v[kVectors];
      for (int i = 0; i < kVectors; ++i) {
        v[i] = S::load(x + i * S::kLanes);
        if (!inverse) v[i] = S::mul(v[i], S::load(signs + i * S::kLanes));
      }
      if (kvpack::hadamard_order(D) != 1 && inverse)  // the others are symmetric
        hadamard<S, D, true>(v);
      else
        hadamard<S, D>(v);
      for (int i = 0; i < kVectors; ++i) {
        v[i] = S::mul(v[i], norm);
        S::store(x + i * S::kLanes, inverse ? S::mul(v[i], S::load(signs + i * S::kLanes)) : v[i]);
      }
    }
  });
}

}  // namespace
