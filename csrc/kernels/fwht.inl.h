// Unnormalised fast Walsh-Hadamard transform, strides d/2, d/4, ..., 1: (a, b) -> (a + b, a - b).
//
// The order of the stages is part of the format: encoders on every level must round alike. The vector stays in
// registers; strides below the lane count are shuffles inside a register.
#pragma once
#include "kernels/table.h"

namespace {

template <class S, int D>
[[gnu::always_inline]] inline void fwht(typename S::F (&v)[D / S::kLanes]) {
  constexpr int kVectors = D / S::kLanes;
  for (int stride = kVectors / 2; stride >= 1; stride /= 2)
    for (int i = 0; i < kVectors; ++i)
      if ((i & stride) == 0) {
        const auto a = v[i], b = v[i + stride];
        v[i] = S::add(a, b);
        v[i + stride] = S::sub(a, b);
      }
  for (int i = 0; i < kVectors; ++i) v[i] = S::hadamard_in_lane(v[i]);
}

// Calls run.template operator()<D>() for the head sizes of the format.
template <class Run>
auto for_head_dim(int head_dim, Run&& run) {
  switch (head_dim) {
    case 64: return run.template operator()<64>();
    case 128: return run.template operator()<128>();
    default: return run.template operator()<256>();
  }
}

// Orthonormal randomized Hadamard: forward H(s x)/sqrt(d), inverse s H(y)/sqrt(d).
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
      fwht<S, D>(v);
      for (int i = 0; i < kVectors; ++i) {
        v[i] = S::mul(v[i], norm);
        S::store(x + i * S::kLanes, inverse ? S::mul(v[i], S::load(signs + i * S::kLanes)) : v[i]);
      }
    }
  });
}

}  // namespace
