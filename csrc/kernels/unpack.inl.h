// From packed lines to level bytes: one unit of one lane vector. See format.h for where the fields lie.
//
// An unpacker loads unit by unit along the depth axis, and may carry something of a lane vector from unit to unit
// (Carry, made by start() from the last unit of the lane vector: sequences are circular). levels<J>() are those of one
// of the kDwords dwords of what was loaded. shared() is for a unit of which each of two or four lane blocks has a share
// (format.h); it calls use(j, levels) for the four dwords of one.
#pragma once
#include "kernels/blocking.inl.h"
#include "kernels/levels.inl.h"
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
    const Self& self = static_cast<const Self&>(*this);
    const auto raw = self.load(p, carry);
    unrolled<Self::kDwords>([&](auto j) __attribute__((always_inline)) {
      if (j / 4 == share) use(std::integral_constant<int, j % 4>{}, self.template levels<j>(raw));
    });
  }
};

// The lines of a unit, of one lane vector.
template <class S, int Lines>
struct UnitLines {
  typename S::I line[Lines];
  [[gnu::always_inline]] static UnitLines load(const uint8_t* p) {
    UnitLines raw;
    for (int n = 0; n < Lines; ++n) raw.line[n] = S::load_bytes(p + n * kvpack::kLine);
    return raw;
  }
};

// Tables of a codec for one side.
template <class S, class Codec, kvpack::Side Sd>
struct Unpacker : Memoryless<Unpacker<S, Codec, Sd>> {
  using I = typename S::I;
  using Carry = typename Memoryless<Unpacker>::Carry;
  static constexpr int kBits = Codec::kBits;
  static constexpr int kOffset = level_offset<S, Codec, Sd>();
  static constexpr int kDwords = kvpack::unit_dwords(kBits);
  static constexpr int kLines = kvpack::unit_lines(kBits);
  using Raw = UnitLines<S, kLines>;
  // With internal linkage: ISA units export nothing but their table.
  static constexpr kvpack::LevelTable kLevels = read_levels<S, Codec, Sd>();
  static constexpr auto kBytes = S::template table_bytes<kBits>(kLevels.level, kOffset);
  typename S::template Table<kBits> table = S::template load_table<kBits>(kBytes);

  [[gnu::always_inline]] Raw load(const uint8_t* p, Carry& /*carry*/) const { return Raw::load(p); }
  template <int J>
  [[gnu::always_inline]] I levels(const Raw& raw) const {
    if constexpr (kBits != 3) {
      return S::template look_up<kBits, J * kBits>(table, raw.line[0]);
    } else if constexpr (J < 6) {
      return S::template look_up<3, J % 2 * 3>(table, raw.line[J / 2]);
    } else {  // bits 6 and 7 of the three planes, side by side, are the two last codes
      const I two = S::template select_bits<0x03>(S::shift_right_16(raw.line[0], 6), S::shift_right_16(raw.line[1], 4));
      const I rest = S::template select_bits<0x0f>(two, S::shift_right_16(raw.line[2], 2));
      return S::template look_up<3, J % 2 * 3>(table, rest);
    }
  }
};

// 8 bits: level = code - 128, so the byte itself is the level with offset 128.
template <class S, class Codec, kvpack::Side Sd>
requires(Codec::kBits == 8) struct Unpacker<S, Codec, Sd> : Memoryless<Unpacker<S, Codec, Sd>> {
  using Carry = typename Memoryless<Unpacker>::Carry;
  static constexpr int kDwords = 1, kLines = 1;
  using Raw = UnitLines<S, kLines>;
  [[gnu::always_inline]] Raw load(const uint8_t* p, Carry& /*carry*/) const { return Raw::load(p); }
  template <int>
  [[gnu::always_inline]] typename S::I levels(const Raw& raw) const {
    constexpr bool kAsItIs = kExpanded<Codec> || level_offset<S, Codec, Sd>() == 128;
    return kAsItIs ? raw.line[0] : S::flip_sign_bit(raw.line[0]);
  }
};

// 5 bits: level = code - 16.
template <class S, class Codec, kvpack::Side Sd>
requires(Codec::kBits == 5) struct Unpacker<S, Codec, Sd> : Memoryless<Unpacker<S, Codec, Sd>> {
  using Carry = typename Memoryless<Unpacker>::Carry;
  static constexpr int kDwords = 8, kLines = 5;
  static constexpr int kOffset = level_offset<S, Codec, Sd>();
  using Raw = UnitLines<S, kLines>;
  [[gnu::always_inline]] Raw load(const uint8_t* p, Carry& /*carry*/) const { return Raw::load(p); }
  template <int J>
  [[gnu::always_inline]] typename S::I levels(const Raw& raw) const {
    const typename S::I low = J % 2 == 0 ? raw.line[J / 2] : S::shift_right_16(raw.line[J / 2], 4);
    const typename S::I high = J < 4    ? S::shift_left_16(raw.line[4], J < 4 ? 4 - J : 1)
                               : J == 4 ? raw.line[4]
                                        : S::shift_right_16(raw.line[4], J > 4 ? J - 4 : 1);
    const typename S::I code = S::template join_bits<0x0f, 0x10>(low, high);
    constexpr int kMore = kOffset - 16;
    return kMore == 0 ? code
                      : S::add_bytes(code, S::splat(static_cast<int32_t>(0x01010101U * static_cast<uint8_t>(kMore))));
  }
};

// Trellis codes: the bytes of a line are bit streams, 16 lanes x 4 byte columns of them. The window of the code that
// ends at bit m of a byte takes bits of that byte and of the one before it, which is carried along; the byte before the
// first one is the last of the byte column before (a rotation of the dword: columns are runs of one circular sequence).
template <class S, class Codec, kvpack::Side Sd>
requires(Codec::kTrellis) struct Unpacker<S, Codec, Sd> {
  using I = typename S::I;
  using Code = typename Codec::Code;
  static constexpr int kOffset = level_offset<S, Codec, Sd>();
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
    unrolled<4>([&](auto j) __attribute__((always_inline)) { use(j, decode<j>(line)); });
    carry.before = share_end(line);
  }

  // The lines of a unit, behind the one before it.
  struct Raw {
    I line[kLines + 1];
  };
  [[gnu::always_inline]] Raw load(const uint8_t* p, Carry& carry) const {
    Raw raw;
    raw.line[0] = carry.before;
    for (int n = 0; n < kLines; ++n) raw.line[n + 1] = S::load_bytes(p + n * kvpack::kLine);
    carry.before = raw.line[kLines];
    return raw;
  }
  template <int J>
  [[gnu::always_inline]] I levels(const Raw& raw) const {
    return decode<J>(raw.line);
  }

 private:
  template <int J>
  [[gnu::always_inline]] I decode(const I* line) const {
    constexpr int kEnd = static_cast<int>(Codec::kBits * (J + 1)) - 1, kBit = kEnd % 8;
    const I here = line[kEnd / 8 + 1], before = line[kEnd / 8];
    I index = here;
    if constexpr (kBit != 7)
      index = S::template select_bits<(0xff << (7 - kBit)) & 0xff>(S::shift_left_16(here, 7 - kBit),
                                                                   S::shift_right_16(before, kBit + 1));
    // The sign bit is tested where it is: a shift would cost more than the masks of many places.
    return S::template negate_where<kBit>(S::look_up_128(kTables == 1 || J % 2 == 0 ? even : odd, index),
                                          S::exclusive_or(here, before));
  }
};

}  // namespace
