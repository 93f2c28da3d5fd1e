// Trellis codes (TCQ): k bits per value choose a path through windows of 9 bits, and each window has a level. At equal
// bits they reach about 0.6 of the distortion of independent levels. Specified in docs/format.md and
// reference/trellis.py; searched by kernels/viterbi.inl.h; the levels are trained by tools/train_trellis.cpp.
//
//   window    w_i = w_{i-1} >> k | c_i << (9 - k): the last 9 code bits, the newest on top; indices wrap around
//   level     T[w >> 1 & 127], negated where bit 8 and bit 0 of w differ
//
// Half-bit codes take one bit more in odd steps than in even ones, and have a table for each.
#pragma once
#include "kvpack/types.h"

namespace kvpack {

// Level * unit / 2^13 approximates a coordinate of unit variance. level[1] is for odd steps, where they differ.
struct TrellisLevels {
  int32_t unit;
  int8_t level[2][128];
};

}  // namespace kvpack

#include "codecs/trellis_tables.h"

namespace kvpack {

constexpr int32_t kTrellisCodes = 6;
constexpr int32_t kTrellisSteps = 256;  // the longest sequence
constexpr int32_t kTrellisLanes = 32;   // sequences that are searched together, at most
constexpr float kTrellisFixed = 8192;   // a coordinate 1.0 in the search's fixed point

// What the search needs to know. kDoublings: costs are (2^kDoublings (x - level))^2, for a resolution that suits the
// distortion; kSeam: steps on either side of the seam that decide with which state a sequence begins and ends.
template <int32_t Even, int32_t Odd, int32_t Doublings, int32_t Seam>
struct TrellisCode {
  static constexpr int32_t kEvenBits = Even, kOddBits = Odd, kDoublings = Doublings, kSeam = Seam;
};
struct Tcq1Code : TrellisCode<1, 1, 0, 64> {
  static constexpr TrellisLevels levels() { return kTcq1Levels; }
};
struct Tcq2Code : TrellisCode<2, 2, 0, 32> {
  static constexpr TrellisLevels levels() { return kTcq2Levels; }
};
struct Tcq25Code : TrellisCode<2, 3, 0, 32> {
  static constexpr TrellisLevels levels() { return kTcq25Levels; }
};
struct Tcq3Code : TrellisCode<3, 3, 0, 24> {
  static constexpr TrellisLevels levels() { return kTcq3Levels; }
};
struct Tcq35Code : TrellisCode<3, 4, 1, 24> {
  static constexpr TrellisLevels levels() { return kTcq35Levels; }
};
struct Tcq4Code : TrellisCode<4, 4, 1, 24> {
  static constexpr TrellisLevels levels() { return kTcq4Levels; }
};

// Levels in the search's fixed point, each twice: a 32-bit broadcast costs no shuffle.
struct TrellisValues {
  int32_t value[2][128];
};
constexpr int32_t trellis_pair(int32_t value) { return (value & 0xffff) | static_cast<int32_t>(value * 0x10000); }
// The table of step n.
template <class Code>
[[gnu::always_inline]] constexpr int32_t trellis_table(int32_t n) {
  return Code::kEvenBits == Code::kOddBits ? 0 : n % 2;
}
template <class Code>
constexpr TrellisValues trellis_values() {
  constexpr TrellisLevels levels = Code::levels();
  TrellisValues v{};
  for (int p = 0; p < 2; ++p)
    for (int i = 0; i < 128; ++i) v.value[p][i] = trellis_pair(levels.level[trellis_table<Code>(p)][i] * levels.unit);
  return v;
}

// Memory that a search works in; its caller provides it.
struct alignas(64) TrellisWork {
  uint16_t metrics[2][256 * kTrellisLanes];
  uint16_t survivors[kTrellisSteps][16 * kTrellisLanes];
  int16_t x[kTrellisSteps][kTrellisLanes];
  uint16_t state[kTrellisLanes], least[kTrellisLanes];
};

}  // namespace kvpack
