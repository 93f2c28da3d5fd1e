// From packed lines to level bytes: one unit of one lane vector. See format.h for where the fields lie.
#pragma once
#include "codecs/all.h"
#include "kvpack/format.h"

namespace {

// Tables of a codec for one side: key levels carry the policy's offset (kKeyOffset), value levels are signed.
template <class S, class Codec, kvpack::Side Sd>
struct Unpacker {
  static constexpr int kBits = Codec::kBits;
  static constexpr int kOffset = Sd == kvpack::Side::key ? S::kKeyOffset : 0;
  static constexpr int kDwords = kvpack::unit_dwords(kBits);
  static constexpr int kLines = kvpack::unit_lines(kBits);
  // A copy with internal linkage: ISA units export nothing but their table.
  static constexpr kvpack::LevelTable kLevels = Codec::kLevels;
  static constexpr auto kBytes = S::template table_bytes<kBits>(kLevels.level, kOffset);
  typename S::template Table<kBits> table = S::template load_table<kBits>(kBytes);

  // Calls use(j, levels) for the kDwords dwords of the unit at p.
  template <class Use>
  [[gnu::always_inline]] void operator()(const uint8_t* p, Use&& use) const {
    using I = typename S::I;
    const I a = S::load_bytes(p);
    if constexpr (kBits == 4) {
      use(0, S::template look_up<4, 0>(table, a));
      use(1, S::template look_up<4, 4>(table, a));
    } else if constexpr (kBits == 2) {
      use(0, S::template look_up<2, 0>(table, a));
      use(1, S::template look_up<2, 2>(table, a));
      use(2, S::template look_up<2, 4>(table, a));
      use(3, S::template look_up<2, 6>(table, a));
    } else {
      static_assert(kBits == 3);
      const I b = S::load_bytes(p + kvpack::kLine), c = S::load_bytes(p + 2 * kvpack::kLine);
      use(0, S::template look_up<3, 0>(table, a));
      use(1, S::template look_up<3, 3>(table, a));
      use(2, S::template look_up<3, 0>(table, b));
      use(3, S::template look_up<3, 3>(table, b));
      use(4, S::template look_up<3, 0>(table, c));
      use(5, S::template look_up<3, 3>(table, c));
      // Bits 6 and 7 of the three planes, side by side, are the two last codes.
      const I ab = S::template select_bits<0x03>(S::shift_right_16(a, 6), S::shift_right_16(b, 4));
      const I rest = S::template select_bits<0x0f>(ab, S::shift_right_16(c, 2));
      use(6, S::template look_up<3, 0>(table, rest));
      use(7, S::template look_up<3, 3>(table, rest));
    }
  }
};

// 8 bits: level = code - 128, so the byte itself is the key level with offset 128.
template <class S, kvpack::Side Sd>
struct Unpacker<S, kvpack::Q8_0, Sd> {
  static constexpr int kDwords = 1, kLines = 1;
  template <class Use>
  [[gnu::always_inline]] void operator()(const uint8_t* p, Use&& use) const {
    const typename S::I raw = S::load_bytes(p);
    constexpr bool offset = Sd == kvpack::Side::key && S::kKeyOffset == 128;
    use(0, offset ? raw : S::flip_sign_bit(raw));
  }
};

}  // namespace
