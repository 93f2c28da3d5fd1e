// What the levels of a codec are when they are multiplied: in which units, with which offset, and how many of their
// products fit in 16 bits (AVX2).
#pragma once
#include <type_traits>

#include "codecs/all.h"
#include "kernels/blocking.inl.h"
#include "kvpack/types.h"

namespace {

// The largest number that divides all levels of a codebook (of tq1 100, of tq2 10). Values are read in units of it, and
// keys where sums of two products could saturate (AVX2): small levels leave room for probabilities and sums of pairs.
template <class Codec>
constexpr int common_factor() {
  int factor = 0;
  for (const int level : Codec::kLevels.level)
    for (int rest = level < 0 ? -level : level; rest != 0;) {
      const int next = factor % rest;
      factor = rest;
      rest = next;
    }
  return factor == 0 ? 1 : factor;
}
// The unit of the levels of a side, as they are read.
template <class S, class Codec, kvpack::Side Sd>
constexpr int level_unit() {
  return Sd == kvpack::Side::value || S::kAddsPairs ? common_factor<Codec>() : 1;
}
template <class S, class Codec, kvpack::Side Sd>
constexpr kvpack::LevelTable read_levels() {
  kvpack::LevelTable t = Codec::kLevels;
  for (int8_t& level : t.level) level = static_cast<int8_t>(level / level_unit<S, Codec, Sd>());
  return t;
}

// The largest size of a level, in units of the common factor.
template <class Codec>
constexpr int largest_level() {
  if constexpr (Codec::kBits == 8 || Codec::kTrellis) return 128;
  if constexpr (Codec::kBits == 5) return 16;
  if constexpr (Codec::kBits != 8 && Codec::kBits != 5 && !Codec::kTrellis) {
    int largest = 0;
    for (int i = 0; i < 1 << Codec::kBits; ++i) {
      const int level = Codec::kLevels.level[i];
      largest = level > largest ? level : -level > largest ? -level : largest;
    }
    return largest / common_factor<Codec>();
  }
}

// Sums of two products that fit in 16 bits together; 1: none are added there. Of keys, the products are of codes, which
// are never negative, with bytes up to 127; of values, of levels with bytes up to 255.
template <class S, class Codec, kvpack::Side Sd>
constexpr int pair_sums() {
  constexpr int kPair = 2 * largest_level<Codec>() * (Sd == kvpack::Side::key ? 2 * 127 : 255), kFit = 0x7fff / kPair;
  return S::kAddsPairs && kFit > 1 ? kFit : 1;
}

// What is added to the levels of a side. Negation of a byte with an offset of 128 negates its level.
template <class S, class Codec, kvpack::Side Sd>
constexpr int level_offset() {
  if constexpr (Sd == kvpack::Side::value) return S::kValueOffset;
  // Of asymmetric keys, the least that leaves none below 0: floats take it off again (query.inl.h).
  if constexpr (S::kKeyOffset != 0 && Codec::kAsymmetric) return largest_level<Codec>();
  if constexpr (S::kKeyOffset != 0) return Codec::kBits == 5 ? 16 : S::kKeyOffset;
  return pair_sums<S, Codec, Sd>() > 1 ? largest_level<Codec>() : 0;
}

// Whether quantized queries come with their sums: levels of keys are read with something added to them. Rows hold -128
// times these.
template <class S>
constexpr bool kSumsQueries = S::kKeyOffset != 0 || S::kAddsPairs;
template <class S, class Codec>
constexpr int32_t key_begin(int32_t offset) {
  constexpr int kOffset = level_offset<S, Codec, kvpack::Side::key>();
  return kOffset == 128 ? offset : (offset >> 7) * kOffset;
}

// Levels that a tile was expanded to (expand.inl.h), in the order of codes of 8 bits, with the offset of their side.
struct LevelBytes : kvpack::CodecDefaults {
  static constexpr int32_t kBits = 8;
};
template <class Codec>
constexpr bool kExpanded = std::is_same_v<Codec, LevelBytes>;

// Integer sums of `Rows` query rows (or planes of them) and `Vectors` lane vectors. In 32 bits, or by way of sums of
// pairs in 16, which are widened after kSpan units of `Dwords` dwords; where those of a unit do not fit (kSpan 0),
// within units, one vector after the other. The fewer sums are widened, the fewer instructions: of tq1, q4_0 and kivi2,
// none of their scale block or tile.
template <class S, class Codec, kvpack::Side Sd, int Rows, int Vectors, int Dwords>
struct Sums {
  using I = typename S::I;
  static constexpr int kPairs = pair_sums<S, Codec, Sd>(), kSpan = kPairs == 1 ? 0 : kPairs / Dwords;
  // The most dwords of a unit that are added before they are widened; shares of units have four.
  static constexpr int kWithin = kPairs >= 4 ? 4 : kPairs >= 2 ? 2 : 1;
  I acc[Rows][Vectors];
  I pairs[kPairs == 1 ? 1 : Rows][kSpan == 0 ? 1 : Vectors];

  // body(first, next) for units begin..end, span by span.
  template <class Body>
  [[gnu::always_inline]] void spans(int begin, int end, Body&& body) {
    if constexpr (kSpan == 0) {
      body(begin, end);
    } else {
      for (int first = begin, next; first < end; first = next) {
        next = first + kSpan < end ? first + kSpan : end;
        unrolled<Rows * Vectors>([&](int i)
                                     __attribute__((always_inline)) { pairs[i / Vectors][i % Vectors] = S::splat(0); });
        body(first, next);
        unrolled<Rows * Vectors>([&](int i) __attribute__((always_inline)) {
          acc[i / Vectors][i % Vectors] = S::widen(acc[i / Vectors][i % Vectors], pairs[i / Vectors][i % Vectors]);
        });
      }
    }
  }
  // Dword J of a unit's levels meets an operand.
  template <class J>
  [[gnu::always_inline]] void meet(J /*dword*/, int row, int v, typename S::Code code, const int32_t* operand) {
    if constexpr (kPairs == 1) {
      acc[row][v] = S::template dot<Sd>(acc[row][v], code, operand);
    } else {
      I& sum = pairs[row][kSpan == 0 ? 0 : v];
      if constexpr (kSpan == 0) {
        static_assert(S::kOpenLines == 1);  // one lane vector at a time
        if constexpr (J() % kWithin == 0) sum = S::splat(0);
      }
      sum = S::template dot_pairs<Sd>(sum, code, operand);
      if constexpr (kSpan == 0 && (J() % kWithin == kWithin - 1 || J() == Dwords - 1))
        acc[row][v] = S::widen(acc[row][v], sum);
    }
  }
};

}  // namespace
