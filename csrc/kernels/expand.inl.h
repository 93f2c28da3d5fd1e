// Trellis codes of a tile -> bytes of levels in L1, where a kernel that looks levels up between its products is no
// good: its registers do not hold a table of 128 beside the accumulators (AVX2, AVX-512 without VBMI), or the code for
// a unit of 16 dwords does not fit the instruction cache beside that of the other side (VBMI, half bits). Levels are
// looked up in a loop of their own, then read as codes of 8 bits are, by kernels that all trellis codecs share. The
// packed tile to come is prefetched here, and nothing by those.
//
//   packed lines -> Unpacker -> level bytes, in the lines of codes of 8 bits (format.h): [depth / 4][lane][4]
//
// Score and accumulate of four query rows of d = 128, hot, ns per token, against looking up between the products. AVX2
// (Zen 3): tcq2 40 instead of 43, tcq3 41 (49), tcq4 38 (42), tcq2.5 42 (63), tcq3.5 42 (65). AVX-512 (Zen 5, with
// softmax between them): without VBMI tcq1 9.5 (13), tcq2 9.2 (9.5), tcq3 9.3 (11.7), tcq4 9.2 (9.2), tcq2.5 9.7
// (16.9), tcq3.5 9.7 (14.5); with it tcq2.5 5.4 (7.8), but tcq3 5.5 (4.8). Of fewer rows, and with AVX-VNNI, it was not
// measured.
//
// Overflow: as codes of 8 bits (score.inl.h, accumulate.inl.h).
#pragma once
#include "kernels/accumulate.inl.h"
#include "kernels/score.inl.h"

namespace {

template <class S, class Codec, kvpack::Side Sd>
[[gnu::noinline]] void expand_levels(const uint8_t* codes, const uint8_t* ahead, int32_t head_dim, uint8_t* levels) {
  using namespace kvpack;
  using U = Unpacker<S, Codec, Sd>;
  constexpr int kPerBlock = 16 / S::kLanes, kDwords = U::kDwords, kLines = U::kLines;
  constexpr int kSharers = unit_sharers(Codec::kBits);
  const U unpack;
  const CodeGrid from = code_grid(Codec::kBits, head_dim, Sd), to = code_grid(8, head_dim, Sd);
  const int units = from.units(), parts = from.parts();
  for (int sb = 0; sb < from.superblocks(); ++sb)
    for (int v = 0; v < from.lane_blocks(sb) * kPerBlock; ++v) {
      const int block = v / kPerBlock, byte = v % kPerBlock * 4 * S::kLanes;
      const auto lines_of = [&](int u) { return codes + from.line(sb, u, block) + byte; };
      const auto shared_of = [&](int part) { return codes + from.shared_line(sb, part, block) + byte; };
      const auto fetch = [&](const uint8_t* p) __attribute__((always_inline)) {
        if (v % kPerBlock == 0 && ahead != nullptr)
          for (int n = 0; n < kLines; ++n) S::prefetch(ahead + (p - codes) + n * kLine);
      };
      uint8_t* out = levels + to.line(sb, 0, block) + byte;
      const ptrdiff_t stride = static_cast<ptrdiff_t>(to.line(sb, 1, block) - to.line(sb, 0, block));
      const auto put = [&](typename S::I one) __attribute__((always_inline)) {
        S::store_vector(out, one);
        out += stride;
      };
      const int share = block % kSharers;
      auto carry = kDwords >= 8 && parts != 0
                       ? unpack.start_shared(lines_of(units > 0 ? units - 1 : 0), shared_of(parts - 1), share)
                       : unpack.start(lines_of(units > 0 ? units - 1 : 0));
      for (int u = 0; u < units; ++u) {
        const uint8_t* p = lines_of(u);
        fetch(p);
        const auto raw = unpack.load(p, carry);
        unrolled<kDwords>([&](auto j) __attribute__((always_inline)) { put(unpack.template levels<j>(raw)); });
      }
      if constexpr (kDwords >= 8)
        for (int part = 0; part < parts; ++part) {
          const uint8_t* p = shared_of(part);
          if (share == 0) fetch(p);
          unpack.shared(
              p, share, carry, [&](auto, typename S::I one) __attribute__((always_inline)) { put(one); });
        }
    }
}

template <class S, class Codec, int G>
void score_expanded(const kvpack::ScoreArgs& a) {
  alignas(64) uint8_t levels[kvpack::kTile * kvpack::kMaxHeadDim];
  expand_levels<S, Codec, kvpack::Side::key>(a.tile.codes, a.first == 0 ? a.ahead : nullptr, a.head_dim, levels);
  kvpack::ScoreArgs bytes = a;
  bytes.tile.codes = levels;
  score<S, LevelBytes, G>(bytes);
}

template <class S, class Codec, int G>
void accumulate_expanded(const kvpack::AccumulateArgs& a) {
  alignas(64) uint8_t levels[kvpack::kTile * kvpack::kMaxHeadDim];
  expand_levels<S, Codec, kvpack::Side::value>(a.tile.codes, a.ahead, a.head_dim, levels);
  kvpack::AccumulateArgs bytes = a;
  bytes.tile.codes = levels;
  accumulate<S, LevelBytes, G>(bytes);
}

}  // namespace
