// One step of the online softmax: 64 scores of each row of a group against the running maximum.
//
// Scores are in log2 units, so 2^x is a polynomial on [-1/2, 1/2] and an exponent shift. Probabilities below 2^-126
// of the maximum are exactly zero: no denormals enter the accumulation, and a masked token (-inf) weighs nothing.
#pragma once
#include "kernels/table.h"

namespace {

// 2^x for x <= 0; relative error 4e-6 (degree 5, Taylor-like minimax on half a unit).
template <class S>
typename S::F exp2_nonpositive(typename S::F x) {
  using F = typename S::F;
  const F floor = S::set1(-126.0F), clamped = S::max(x, floor);
  const F n = S::round_even(clamped), f = S::sub(clamped, n);
  F p = S::set1(1.33335581e-3F);
  p = S::fma(p, f, S::set1(9.61812911e-3F));
  p = S::fma(p, f, S::set1(5.55041087e-2F));
  p = S::fma(p, f, S::set1(2.40226507e-1F));
  p = S::fma(p, f, S::set1(6.93147181e-1F));
  p = S::fma(p, f, S::set1(1.0F));
  return S::zero_where_less(S::scale_by_power(p, n), x, floor);
}

// Soft cap of scores in log2 units: cap' * tanh(s / cap'), cap' = cap * log2(e), written with 2^x on x <= 0.
template <class S>
void softcap(float* scores, int32_t n, float cap) {
  using F = typename S::F;
  const F limit = S::set1(cap * 1.44269504F), slope = S::set1(-2.0F / cap), one = S::set1(1.0F);
  for (int i = 0; i < n; i += S::kLanes) {
    const F s = S::load(scores + i), e = exp2_nonpositive<S>(S::mul(S::abs(s), slope));
    S::store(scores + i, S::mul(limit, S::copy_sign(S::div(S::sub(one, e), S::add(one, e)), s)));
  }
}

template <class S>
void softmax(const kvpack::SoftmaxArgs& a) {
  using namespace kvpack;
  using F = typename S::F;
  constexpr int kVectors = kTile / S::kLanes;
  const int lines_per_row = (a.ahead_lines + a.group - 1) / a.group;
  for (int g = 0; g < a.group; ++g) {
    for (int n = g * lines_per_row; n < (g + 1) * lines_per_row && n < a.ahead_lines; ++n)
      S::prefetch(a.ahead + n * kLine);
    float* s = a.scores + g * kTile;
    F top = S::load(s);
    for (int v = 1; v < kVectors; ++v) top = S::max(top, S::load(s + v * S::kLanes));
    const float max = S::reduce_max(top);
    SoftmaxRow& row = a.rows[g];
    if (max > row.max) {
      // Nothing has been accumulated yet where the old maximum is -inf.
      const float shrink = row.max == -__builtin_inff() ? 0.0F : __builtin_exp2f(row.max - max);
      float* out = a.out + static_cast<ptrdiff_t>(g) * a.out_stride;
      const F k = S::set1(shrink);
      for (int i = 0; i < a.out_stride; i += S::kLanes) S::store(out + i, S::mul(S::load(out + i), k));
      row.sum *= shrink;
      row.max = max;
    }
    if (row.max == -__builtin_inff()) {  // every token so far is masked
      for (int v = 0; v < kVectors; ++v) S::store(s + v * S::kLanes, S::zero());
      continue;
    }
    const F m = S::set1(row.max);
    F sum = S::zero();
    for (int v = 0; v < kVectors; ++v) {
      const F p = exp2_nonpositive<S>(S::sub(S::load(s + v * S::kLanes), m));
      S::store(s + v * S::kLanes, p);
      sum = S::add(sum, p);
    }
    row.sum += S::reduce_add(sum);
  }
}

}  // namespace
