// The search of the trellis codecs: of all codes of a sequence, those whose levels come closest to it. Which codes
// these are is part of the format (docs/format.md): everything here is exact in integers, ties included.
//
// A lane is a sequence, so that nothing is ever shuffled. Between two steps only the window bits that the next step
// keeps matter: for k bits per step, 2^(9-k) states, each entered by 2^k windows. A state's metric is 16 bits, unsigned
// and saturating, with the number h of the window that entered last in its lowest bits: one minimum then yields the
// metric, the survivor and the rule for ties. Windows w and w + 256 have one table index, with opposite signs, and
// come from the same state: they are taken together, and every cost is computed once, in registers.
#pragma once
#include "codecs/trellis.h"

namespace {

// One step: In bits come, Out bits will go with the next step; Tag low bits of a metric hold h.
template <class W, int In, int Out, int Tag, int Doublings>
struct TrellisStep {
  using V = typename W::V;
  static constexpr int kFrom = 512 >> In, kTo = 512 >> Out, kGroups = 512 >> (In + Out);
  static constexpr int kSymbols = 1 << In, kEnter = 1 << Out;
  // Survivors: fields of 1, 2 or 4 bits in words of 16. A group of states has kSymbols of them.
  static constexpr int kField = Out == 3 ? 4 : Out, kPerWord = 16 / kField;
  static constexpr int kTogether = kPerWord > kSymbols ? kPerWord / kSymbols : 1;
  static_assert(kTo / kPerWord <= 16, "survivors of a step");

  static V cost(V d) {
    for (int i = 0; i < Doublings; ++i) d = W::add_saturated(d, d);
    return W::template clear_low<Tag>(W::square(d));
  }

  // Metrics of the old states to metrics of the new ones, and their survivors. least: the smallest old metric;
  // returned is the smallest new one.
  static V run(V x, const int32_t* values, const uint16_t* old, V least, uint16_t* metrics, uint16_t* survivors) {
    const V norm = W::template clear_low<Tag>(least);
    V best = W::splat(-1);
    for (int r0 = 0; r0 < kGroups; r0 += kTogether) {
      V word = W::splat(0);
      int fields = 0;
#pragma GCC unroll 8
      for (int u = 0; u < kTogether; ++u) {
        const int r = r0 + u;
        V from[kEnter];
#pragma GCC unroll 16
        for (int h = 0; h < kEnter; ++h)
          from[h] = W::template set_low<Tag>(W::sub(W::load(old + (r * kEnter + h) * W::kLanes), norm), h);
#pragma GCC unroll 8
        for (int c = 0; c < kSymbols / 2; ++c) {
          V low = best, high = best;
#pragma GCC unroll 8
          for (int h = 0; h < kEnter; h += 2) {
            const V value = W::splat_pair(values[c << (8 - In) | r << (Out - 1) | h / 2]);
            const V same = cost(W::sub_saturated(x, value)), opposite = cost(W::add_saturated(x, value));
            const V low_pair = W::min(W::add_unsigned(from[h], same), W::add_unsigned(from[h + 1], opposite));
            const V high_pair = W::min(W::add_unsigned(from[h], opposite), W::add_unsigned(from[h + 1], same));
            low = h == 0 ? low_pair : W::min(low, low_pair);
            high = h == 0 ? high_pair : W::min(high, high_pair);
          }
          const int to = c << (9 - In - Out) | r;
          W::store(metrics + to * W::kLanes, low);
          W::store(metrics + (to + kTo / 2) * W::kLanes, high);
          best = W::min(best, W::min(low, high));
          word = W::template push<kField, Out>(W::template push<kField, Out>(word, low), high);
          fields += 2;
          if (fields == kPerWord) {
            W::store(survivors, word);
            survivors += W::kLanes;
            fields = 0;
          }
        }
      }
    }
    return best;
  }

  // The window by which a lane's sequence entered `state`.
  static int window(const uint16_t* survivors, int lane, int state) {
    const int r = state & (kGroups - 1), c = state >> (9 - In - Out);
    const int at = r << In | ((c << 1 | c >> (In - 1)) & (kSymbols - 1));
    const int field = survivors[at / kPerWord * W::kLanes + lane] >> (kField * (kPerWord - 1 - at % kPerWord));
    return state << Out | (field & (kEnter - 1));
  }
};

template <class S, class Code>
class TrellisSearch {
  using W = typename S::W16;
  using V = typename W::V;
  using TrellisWork = kvpack::TrellisWork;
  static constexpr int kEven = Code::kEvenBits, kOdd = Code::kOddBits, kTag = kEven > kOdd ? kEven : kOdd;
  using Even = TrellisStep<W, kEven, kOdd, kTag, Code::kDoublings>;
  using Odd = TrellisStep<W, kOdd, kEven, kTag, Code::kDoublings>;
  static constexpr int kStates = Even::kFrom;  // before an even step, where sequences begin and end
  static_assert(W::kLanes <= kvpack::kTrellisLanes);

 public:
  // `count` sequences: x [steps][stride] to codes [steps][stride].
  static void run(const kvpack::TrellisValues& values, const int16_t* x, int steps, int stride, int count,
                  uint8_t* codes, TrellisWork& work) {
    for (int i = 0; i < steps; ++i) {
      __builtin_memset(work.x[i], 0, sizeof work.x[i]);
      __builtin_memcpy(work.x[i], x + static_cast<ptrdiff_t>(i) * stride, static_cast<size_t>(count) * 2);
    }
    // Where to begin and end: the state at the seam of the best path through its neighbourhood.
    for (int s = 0; s < kStates; ++s) W::store(work.metrics[0] + s * W::kLanes, W::splat(0));
    const int seam = Code::kSeam < steps ? Code::kSeam : steps;
    forward(values, steps - seam, 2 * seam, steps, work);
    best_state(work);
    for (int i = seam - 1; i >= 0; --i)
      for (int l = 0; l < W::kLanes; ++l) work.state[l] = static_cast<uint16_t>(back(seam + i, l, work));
    // The path itself, from that state and to it.
    for (int s = 0; s < kStates; ++s)
      for (int l = 0; l < W::kLanes; ++l) work.metrics[0][s * W::kLanes + l] = work.state[l] == s ? 0 : 0xffff;
    forward(values, 0, steps, steps, work);
    for (int i = steps - 1; i >= 0; --i) {
      const int bits = i % 2 == 0 ? kEven : kOdd, next = i % 2 == 0 ? kOdd : kEven;
      uint8_t* out = codes + static_cast<ptrdiff_t>(i) * stride;
      for (int l = 0; l < count; ++l) {
        out[l] = static_cast<uint8_t>(work.state[l] >> (9 - bits - next));
        work.state[l] = static_cast<uint16_t>(back(i, l, work));
      }
    }
  }

 private:
  static void forward(const kvpack::TrellisValues& values, int first, int count, int steps, TrellisWork& work) {
    V least = W::splat(0);
    for (int i = 0, at = first % steps; i < count; i += 2, at = at + 2 == steps ? 0 : at + 2) {
      least =
          Even::run(W::load(work.x[at]), values.value[0], work.metrics[0], least, work.metrics[1], work.survivors[i]);
      least = Odd::run(W::load(work.x[at + 1]), values.value[1], work.metrics[1], least, work.metrics[0],
                       work.survivors[i + 1]);
    }
  }
  // The first state of the smallest metric, tags apart.
  static void best_state(TrellisWork& work) {
    for (int l = 0; l < W::kLanes; ++l) work.least[l] = 0xffff, work.state[l] = 0;
    for (int s = 0; s < kStates; ++s)
      for (int l = 0; l < W::kLanes; ++l) {
        const auto metric = static_cast<uint16_t>(work.metrics[0][s * W::kLanes + l] >> kTag);
        const bool less = metric < work.least[l];
        work.least[l] = less ? metric : work.least[l];
        work.state[l] = less ? static_cast<uint16_t>(s) : work.state[l];
      }
  }
  static int back(int i, int lane, const TrellisWork& work) {
    const int state = work.state[lane];
    if (i % 2 == 0) return Even::window(work.survivors[i], lane, state) & (Even::kFrom - 1);
    return Odd::window(work.survivors[i], lane, state) & (Odd::kFrom - 1);
  }
};

// x [steps][lanes] in fixed point to codes [steps][lanes]. steps: even, 16 to 256; lanes: a multiple of 16.
template <class S, class Code>
void trellis_search(const int16_t* x, int32_t steps, int32_t lanes, uint8_t* codes, kvpack::TrellisWork* work) {
  static constexpr kvpack::TrellisValues kValues = kvpack::trellis_values<Code>();
  constexpr int kTogether = S::W16::kLanes;
  for (int at = 0; at < lanes; at += kTogether) {
    const int count = lanes - at < kTogether ? lanes - at : kTogether;
    TrellisSearch<S, Code>::run(kValues, x + at, steps, lanes, count, codes + at, *work);
  }
}

}  // namespace
