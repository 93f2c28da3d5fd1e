// One step of the online softmax: 64 scores of each row of a group against a running maximum.
//
// Scores are in log2 units, so 2^x is a polynomial on a unit and an exponent shift. Probabilities below 2^-126 of the
// maximum are exactly zero: no denormals enter the accumulation, and a masked token (-inf) weighs nothing.
//
// The maximum may be kRise less than the largest score so far: probabilities relative to it are up to 2^kRise, which
// only values near the end of the range of floats would notice, and what has been accumulated is seldom scaled to a new
// one (Zen 5, tq2 over 16k random tokens: 8 % of the time at d = 128, 15 % at d = 64).
//
// A score that is NaN makes the sum of its row NaN, which attend makes of the row's output.
#pragma once
#include "kernels/blocking.inl.h"
#include "kernels/table.h"
#include "simd/half.h"

namespace {

constexpr float kRise = 8.0F;

template <class S>
concept ScalesByPowers = requires(typename S::F v) {
  S::scale_by_power(v, S::fraction(v));
};

// c[0] + c[1] f + ... + c[4] f^4.
template <class S>
[[gnu::always_inline]] inline typename S::F polynomial(const float (&c)[5], typename S::F f) {
  typename S::F p = S::set1(c[4]);
  for (int i = 3; i >= 0; --i) p = S::fma(p, f, S::set1(c[i]));
  return p;
}

// 2^x for x < 127, NaN of NaN; relative error 2.7e-6 (minimax of degree 4 on a unit).
template <class S>
typename S::F exp2_approx(typename S::F x) {
  if constexpr (ScalesByPowers<S>) {
    // Of denormals nothing is left, as attention flushes them (core/fp_control.h).
    constexpr float kPower[5] = {1.00000262F, 6.93003833e-1F, 2.41442740e-1F, 5.20114638e-2F, 1.35341724e-2F};
    return S::scale_by_power(polynomial<S>(kPower, S::fraction(x)), x);
  } else {
    // Adding 1.5 * 2^23 rounds to a whole number n, and leaves it in the lowest bits.
    using F = typename S::F;
    constexpr float kPower[5] = {9.99999285e-1F, 6.93121791e-1F, 2.40247443e-1F, 5.59178628e-2F, 9.57010221e-3F};
    const F floor = S::set1(-126.0F), whole = S::set1(12582912.0F);
    const F clamped = S::max(floor, x), shifted = S::add(clamped, whole);
    const F f = S::sub(clamped, S::sub(shifted, whole));
    return S::zero_where_less(S::add_to_exponent(polynomial<S>(kPower, f), shifted), x, floor);
  }
}

// Soft cap of scores in log2 units: cap' * tanh(s / cap'), cap' = cap * log2(e), written with 2^x on x <= 0.
template <class S>
void softcap(float* scores, int32_t n, float cap) {
  using F = typename S::F;
  const F limit = S::set1(cap * 1.44269504F), slope = S::set1(-2.0F / cap), one = S::set1(1.0F);
  for (int i = 0; i < n; i += S::kLanes) {
    const F s = S::load(scores + i), e = exp2_approx<S>(S::mul(S::abs(s), slope));
    S::store(scores + i, S::mul(limit, S::copy_sign(S::div(S::sub(one, e), S::add(one, e)), s)));
  }
}

// log2(x), x >= 0, at most 0.09 too low; far below everything for 0.
[[maybe_unused, gnu::always_inline]] inline Four rough_log2(Four x) {
  IntFour bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return __builtin_convertvector(bits, Four) * 0x1p-23F - 127.0F;
}

// The rows of a group, side by side.
template <int G>
struct SoftmaxRows {
  static_assert(sizeof(kvpack::SoftmaxRow) == sizeof(Four));
  Four field[4];  // those of SoftmaxRow, of four rows
  Four bias{};

  [[gnu::always_inline]] explicit SoftmaxRows(const kvpack::SoftmaxArgs& a) : field{} {
    // Row by row, as they are stored: GCC would merge the loads into one, which had to wait for all those stores.
    for (int g = 0; g < G; ++g) __builtin_memcpy(field + g, unknown(a.rows + g), sizeof(Four));
    __builtin_memcpy(&bias, a.bias, G * sizeof(float));
    transpose(field);
  }
  [[gnu::always_inline]] void store(const kvpack::SoftmaxArgs& a) const {
    Four row[4] = {field[0], field[1], field[2], field[3]};
    transpose(row);
    for (int g = 0; g < G; ++g) __builtin_memcpy(a.rows + g, row + g, sizeof(Four));
  }
  const Four& max() const { return field[0]; }
  Four& sum() { return field[1]; }
  Four& pending() { return field[3]; }
  Four mass() const { return field[1] + field[2]; }  // so far, here and elsewhere
  Four maximum() const { return max() - bias; }
  // What scores, which are without their bias, raise the maximum above, and are notable above, where anything is. A
  // row's fate must not depend on its neighbours, so that all tests of a score are these comparisons.
  Four raised_above() const { return maximum() + kRise; }
  Four notable_above(float notable) const { return max() + rough_log2(notable * mass()) - bias; }

 private:
  [[gnu::always_inline]] static void transpose(Four (&r)[4]) {
    const Four low01 = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
    const Four low23 = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
    const Four high01 = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    const Four high23 = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    r[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
    r[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
    r[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
    r[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
  }
};

// Where some score may raise the maximum, or be notable: rows with notable ones, in bits. If there are none, what has
// been accumulated is scaled to the new maxima.
template <class S, int G>
[[gnu::noinline]] uint32_t raise_maxima(const kvpack::SoftmaxArgs& a, const typename S::F (&top)[4]) {
  using namespace kvpack;
  const SoftmaxRows<G> rows(a);
  float max[4];
  S::reduce_max_4(top[0], top[1], top[2], top[3], max);
  uint32_t notable = 0;
  for (int g = 0; g < G && a.notable > 0.0F; ++g)
    if (max[g] > rows.notable_above(a.notable)[g]) notable |= 1U << g;
  if (notable != 0) return notable;
  for (int g = 0; g < G; ++g) {
    SoftmaxRow& row = a.rows[g];
    if (!(max[g] > rows.raised_above()[g])) continue;
    // Nothing has been accumulated yet where the old maximum is -inf.
    const float grown = max[g] + a.bias[g],
                shrink = row.max == -__builtin_inff() ? 0.0F : __builtin_exp2f(row.max - grown);
    float* out = a.out + static_cast<ptrdiff_t>(g) * a.out_stride;
    const auto k = S::set1(shrink);
    for (int i = 0; i < a.out_stride; i += S::kLanes) S::store(out + i, S::mul(S::load(out + i), k));
    row.sum *= shrink;
    row.elsewhere *= shrink;
    row.pending *= shrink;
    row.max = grown;
  }
  return 0;
}

// Rows side by side, so that reductions overlap. That nothing is raised or notable is found without a reduction,
// which all that follows would wait for (Zen 5, with scale_by_power: 3 % of the time of tq2 at d = 64).
template <class S, int G>
kvpack::SoftmaxResult softmax_rows(const kvpack::SoftmaxArgs& a) {
  using namespace kvpack;
  using F = typename S::F;
  const F none = S::set1(-__builtin_inff());
  F top[4] = {none, none, none, none};
  for (int t = 0; t < kTile; t += S::kLanes)
    unrolled<G>([&](int g)
                    __attribute__((always_inline)) { top[g] = S::max(top[g], S::load(a.scores + g * kTile + t)); });
  SoftmaxRows<G> rows(a);
  float bound[4];
  const Four raised = rows.raised_above();
  store_4(bound, a.notable > 0.0F ? lesser(rows.notable_above(a.notable), raised) : raised);
  uint32_t over = 0;
  for (int g = 0; g < G; ++g) over |= S::greater_lanes(top[g], S::set1(bound[g]));
  if (over != 0) {
    const uint32_t notable = raise_maxima<S, G>(a, top);
    if (notable != 0) return {false, notable};
    rows = SoftmaxRows<G>(a);
  }
  // Where every token so far is masked, scores are -inf, and so must be what 2^x is taken of.
  float base[4];
  store_4(base, where(rows.max() > -__builtin_inff(), rows.maximum()));
  F sum[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
  float* scores = a.scores;  // which the compiler would read again after every store
  for (int t = 0; t < kTile; t += S::kLanes)
    unrolled<G>([&](int g) __attribute__((always_inline)) {
      float* s = scores + g * kTile + t;
      const F p = exp2_approx<S>(S::sub(S::load(s), S::set1(base[g])));
      S::store(s, p);
      sum[g] = S::add(sum[g], p);
    });
  float added[4];
  S::reduce_add_4(sum[0], sum[1], sum[2], sum[3], added);
  rows.sum() += load_4(added);
  rows.pending() += load_4(added);
  rows.store(a);
  const IntFour less = load_4(added) <= a.negligible * rows.mass();
  bool negligible = true;
  for (int g = 0; g < G; ++g) negligible = negligible && less[g] != 0;
  return {negligible, 0};
}

template <class S>
kvpack::SoftmaxResult softmax(const kvpack::SoftmaxArgs& a) {
  switch (a.group) {
    case 1: return softmax_rows<S, 1>(a);
    case 2: return softmax_rows<S, 2>(a);
    case 3: return softmax_rows<S, 3>(a);
    default: return softmax_rows<S, 4>(a);
  }
}

}  // namespace
