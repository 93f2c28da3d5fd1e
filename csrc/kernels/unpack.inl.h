// From packed lines to level bytes: one unit of one lane vector. See format.h for where the fields lie.
//
// An unpacker is called unit by unit along the depth axis, and may carry something of a lane vector from unit to unit
// (Carry, made by start() from the last unit of the lane vector: sequences are circular). shared() is for a unit of
// which each of two or four lane blocks has a share (format.h); it calls use(j, levels) for the four dwords of one.
#pragma once
#include "codecs/all.h"
#include "kernels/blocking.inl.h"
#include "kvpack/format.h"

namespace {

// Most codecs carry nothing, and unpack a shared unit as any other.
template <class Self>
struct Memoryless {
  struct Carry {};
  Carry start(const uint8_t* /*last*/) const { return {}; }
  Carry start_shared(const uint8_t* /*last*/, const uint8_t* /*shared*/, int /*share*/) const { return {}; }
  template <class Use>
  [[gnu::always_inline]] void shared(const uint8_t* p, int share, Carry& carry, Use&& use) const {
    static_cast<const Self&> (*this)(
        p, carry, [&](int j, auto levels) __attribute__((always_inline)) {
          if (j / 4 == share) use(j % 4, levels);
        });
  }
};

// What a policy adds to the levels of a side. Negation of a byte with an offset of 128 negates its level.
template <class S, kvpack::Side Sd>
constexpr int kLevelOffset = Sd == kvpack::Side::key ? S::kKeyOffset : S::kValueOffset;

// Tables of a codec for one side.
template <class S, class Codec, kvpack::Side Sd>
struct Unpacker : Memoryless<Unpacker<S, Codec, Sd>> {
  using Carry = typename Memoryless<Unpacker>::Carry;
  static constexpr int kBits = Codec::kBits;
  static constexpr int kOffset = kLevelOffset<S, Sd>;
  static constexpr int kDwords = kvpack::unit_dwords(kBits);
  static constexpr int kLines = kvpack::unit_lines(kBits);
  // A copy with internal linkage: ISA units export nothing but their table.
  static constexpr kvpack::LevelTable kLevels = Codec::kLevels;
  static constexpr auto kBytes = S::template table_bytes<kBits>(kLevels.level, kOffset);
  typename S::template Table<kBits> table = S::template load_table<kBits>(kBytes);

  // Calls use(j, levels) for the kDwords dwords of the unit at p.
  template <class Use>
  [[gnu::always_inline]] void operator()(const uint8_t* p, Carry& /*carry*/, Use&& use) const {
    using I = typename S::I;
    const I a = S::load_bytes(p);
    if constexpr (kBits == 1) {
      unrolled<8>([&](auto j) __attribute__((always_inline)) { use(j, S::template look_up<1, j>(table, a)); });
    } else if constexpr (kBits == 4) {
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

// 8 bits: level = code - 128, so the byte itself is the level with offset 128.
template <class S, class Codec, kvpack::Side Sd>
requires(Codec::kBits == 8) struct Unpacker<S, Codec, Sd> : Memoryless<Unpacker<S, Codec, Sd>> {
  using Carry = typename Memoryless<Unpacker>::Carry;
  static constexpr int kDwords = 1, kLines = 1;
  template <class Use>
  [[gnu::always_inline]] void operator()(const uint8_t* p, Carry& /*carry*/, Use&& use) const {
    const typename S::I raw = S::load_bytes(p);
    use(0, kLevelOffset<S, Sd> == 128 ? raw : S::flip_sign_bit(raw));
  }
};

// 5 bits: level = code - 16: four low bits, looked up, and 16 where the high bit is set.
template <class S, class Codec, kvpack::Side Sd>
requires(Codec::kBits == 5) struct Unpacker<S, Codec, Sd> : Memoryless<Unpacker<S, Codec, Sd>> {
  using Carry = typename Memoryless<Unpacker>::Carry;
  static constexpr int kDwords = 8, kLines = 5;
  static constexpr int kOffset = kLevelOffset<S, Sd>;
  static constexpr kvpack::LevelTable kLow{{-16, -15, -14, -13, -12, -11, -10, -9, -8, -7, -6, -5, -4, -3, -2, -1}};
  static constexpr kvpack::LevelTable kHigh{{0, 16}};
  static constexpr auto kLowBytes = S::template table_bytes<4>(kLow.level, kOffset);
  static constexpr auto kHighBytes = S::template table_bytes<1>(kHigh.level, 0);
  typename S::template Table<4> low = S::template load_table<4>(kLowBytes);
  typename S::template Table<1> high = S::template load_table<1>(kHighBytes);
  template <class Use>
  [[gnu::always_inline]] void operator()(const uint8_t* p, Carry& /*carry*/, Use&& use) const {
    using I = typename S::I;
    const I top = S::load_bytes(p + 4 * kvpack::kLine);
    unrolled<4>([&](auto n) __attribute__((always_inline)) {
      const I a = S::load_bytes(p + n * kvpack::kLine);
      use(2 * n, S::add_bytes(S::template look_up<4, 0>(low, a), S::template look_up<1, 2 * n>(high, top)));
      use(2 * n + 1, S::add_bytes(S::template look_up<4, 4>(low, a), S::template look_up<1, 2 * n + 1>(high, top)));
    });
  }
};

// Trellis codes: the bytes of a line are bit streams, 16 lanes x 4 byte columns of them. The window of the code that
// ends at bit m of a byte takes bits of that byte and of the one before it, which is carried along; the byte before the
// first one is the last of the byte column before (a rotation of the dword: columns are runs of one circular sequence).
template <class S, class Codec, kvpack::Side Sd>
requires(Codec::kTrellis) struct Unpacker<S, Codec, Sd> {
  using I = typename S::I;
  using Code = typename Codec::Code;
  static constexpr int kOffset = kLevelOffset<S, Sd>;
  static constexpr int kDwords = kvpack::unit_dwords(Codec::kBits), kLines = kvpack::unit_lines(Codec::kBits);
  static constexpr int kTables = Code::kEvenBits == Code::kOddBits ? 1 : 2;
  struct Levels {
    alignas(64) int8_t at[kTables][128];
    constexpr Levels() : at{} {
      for (int t = 0; t < kTables; ++t)
        for (int i = 0; i < 128; ++i) at[t][i] = static_cast<int8_t>(Code::levels().level[t][i] + kOffset);
    }
  };
  static constexpr Levels kLevels{};
  typename S::Table128 even = S::load_table_128(kLevels.at[0]), odd = S::load_table_128(kLevels.at[kTables - 1]);

  struct Carry {
    I before;
  };
  Carry start(const uint8_t* last) const {
    return {S::rotate_dwords_8(S::load_bytes(last + (kLines - 1) * kvpack::kLine))};
  }

  // Bits of a share of a shared unit, and lines that it needs once it begins at bit 0.
  static constexpr int kShare = 2 * (Code::kEvenBits + Code::kOddBits), kShareLines = (kShare + 7) / 8;
  using ShareLines = I[kShareLines + 1];

  // The low 8 - Shift bits from `low` >> Shift, those above from `high`.
  template <int Shift>
  [[gnu::always_inline]] static I joined(I low, I high) {
    constexpr int kLow = 0xff >> Shift;
    if constexpr (Shift == 0)
      return low;
    else
      return S::template select_bits<kLow>(S::shift_right_16(low, Shift), S::shift_left_16(high, 8 - Shift));
  }
  // The share's own stream, moved to bit 0. Bits above its end are anything.
  [[gnu::always_inline]] static void share_lines(const uint8_t* p, int share, ShareLines& line) {
    unrolled<kDwords / 4>([&](auto i) __attribute__((always_inline)) {
      if (share != i) return;
      unrolled<kShareLines>([&](auto n) __attribute__((always_inline)) {
        constexpr int kAt = kShare * i + 8 * n, kNext = kAt % 8 + kShare - 8 * n > 8 ? 1 : 0;
        const uint8_t* plane = p + kAt / 8 * kvpack::kLine;
        line[n + 1] = joined<kAt % 8>(S::load_bytes(plane), S::load_bytes(plane + kNext * kvpack::kLine));
      });
    });
  }
  // The last eight bits of the stream where a share ends.
  [[gnu::always_inline]] static I share_end(const ShareLines& line) {
    return joined<kShare % 8>(line[kShareLines - 1], line[kShareLines]);
  }

  Carry start_shared(const uint8_t* last, const uint8_t* shared, int share) const {
    ShareLines line;
    line[0] = S::load_bytes(last + (kLines - 1) * kvpack::kLine);
    share_lines(shared, share, line);
    return {S::rotate_dwords_8(share_end(line))};
  }
  template <class Use>
  [[gnu::always_inline]] void shared(const uint8_t* p, int share, Carry& carry, Use&& use) const {
    ShareLines line;
    line[0] = carry.before;
    share_lines(p, share, line);
    decode<4>(line, use);
    carry.before = share_end(line);
  }

  template <class Use>
  [[gnu::always_inline]] void operator()(const uint8_t* p, Carry& carry, Use&& use) const {
    I line[kLines + 1];
    line[0] = carry.before;
    for (int n = 0; n < kLines; ++n) line[n + 1] = S::load_bytes(p + n * kvpack::kLine);
    decode<kDwords>(line, use);
    carry.before = line[kLines];
  }

 private:
  template <int Dwords, class Use>
  [[gnu::always_inline]] void decode(const I* line, Use&& use) const {
    unrolled<Dwords>([&](auto j) __attribute__((always_inline)) {
      constexpr int kEnd = static_cast<int>(Codec::kBits * (j + 1)) - 1, kBit = kEnd % 8;
      const I here = line[kEnd / 8 + 1], before = line[kEnd / 8];
      I index = here;
      if constexpr (kBit != 7)
        index = S::template select_bits<(0xff << (7 - kBit)) & 0xff>(S::shift_left_16(here, 7 - kBit),
                                                                     S::shift_right_16(before, kBit + 1));
      const I change = S::exclusive_or(here, before);
      const I signs = kBit == 7 ? change : S::shift_left_16(change, 7 - kBit);
      use(j, S::negate_where_top_bit(S::look_up_128(kTables == 1 || j % 2 == 0 ? even : odd, index), signs));
    });
  }
};

}  // namespace
