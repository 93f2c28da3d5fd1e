// From packed lines to level bytes: one unit of one lane vector. See format.h for where the fields lie.
//
// An unpacker is called unit by unit along the depth axis, and may carry something of a lane vector from unit to unit
// (Carry, made by start() from the last unit of the lane vector: sequences are circular). shared() is for the last unit
// of two lane blocks, which have half of it each (format.h); it calls use(j, levels) for the four dwords of one half.
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
  Carry start_shared(const uint8_t* /*last*/, const uint8_t* /*shared*/, int /*half*/) const { return {}; }
  template <class Use>
  [[gnu::always_inline]] void shared(const uint8_t* p, int half, Carry& carry, Use&& use) const {
    static_cast<const Self&> (*this)(
        p, carry, [&](int j, auto levels) __attribute__((always_inline)) {
          if (j / 4 == half) use(j % 4, levels);
        });
  }
};

// Tables of a codec for one side: key levels carry the policy's offset (kKeyOffset), value levels are signed.
template <class S, class Codec, kvpack::Side Sd>
struct Unpacker : Memoryless<Unpacker<S, Codec, Sd>> {
  using Carry = typename Memoryless<Unpacker>::Carry;
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

// 8 bits: level = code - 128, so the byte itself is the key level with offset 128.
template <class S, class Codec, kvpack::Side Sd>
requires(Codec::kBits == 8) struct Unpacker<S, Codec, Sd> : Memoryless<Unpacker<S, Codec, Sd>> {
  using Carry = typename Memoryless<Unpacker>::Carry;
  static constexpr int kDwords = 1, kLines = 1;
  template <class Use>
  [[gnu::always_inline]] void operator()(const uint8_t* p, Carry& /*carry*/, Use&& use) const {
    const typename S::I raw = S::load_bytes(p);
    constexpr bool offset = Sd == kvpack::Side::key && S::kKeyOffset == 128;
    use(0, offset ? raw : S::flip_sign_bit(raw));
  }
};

// 5 bits: level = code - 16: four low bits, looked up, and 16 where the high bit is set.
template <class S, class Codec, kvpack::Side Sd>
requires(Codec::kBits == 5) struct Unpacker<S, Codec, Sd> : Memoryless<Unpacker<S, Codec, Sd>> {
  using Carry = typename Memoryless<Unpacker>::Carry;
  static constexpr int kDwords = 8, kLines = 5;
  static constexpr int kOffset = Sd == kvpack::Side::key ? S::kKeyOffset : 0;
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
  static constexpr int kBits = Codec::kBits;
  static constexpr int kOffset = Sd == kvpack::Side::key ? S::kKeyOffset : 0;
  static constexpr int kDwords = kvpack::unit_dwords(kBits), kLines = kvpack::unit_lines(kBits);
  struct Levels {
    alignas(64) int8_t at[128];
    constexpr Levels() : at{} {
      for (int i = 0; i < 128; ++i) at[i] = static_cast<int8_t>(Codec::Code::levels().level[0][i] + kOffset);
    }
  };
  static constexpr Levels kLevels{};
  typename S::Table128 table = S::load_table_128(kLevels.at);

  struct Carry {
    I before;
  };
  Carry start(const uint8_t* last) const {
    return {S::rotate_dwords_8(S::load_bytes(last + (kLines - 1) * kvpack::kLine))};
  }

  // The half's own stream, moved to bit 0: at 3 bits 12 of 24 bits, at 1 bit 4 of 8.
  void half_lines(const uint8_t* p, int half, I (&line)[kLines + 1]) const {
    if constexpr (kBits == 3) {
      const I b = S::load_bytes(p + kvpack::kLine), c = S::load_bytes(p + 2 * kvpack::kLine);
      line[1] =
          half == 0 ? S::load_bytes(p) : S::template select_bits<0x0f>(S::shift_right_16(b, 4), S::shift_left_16(c, 4));
      line[2] = half == 0 ? b : S::shift_right_16(c, 4);
    } else {
      line[1] = half == 0 ? S::load_bytes(p) : S::shift_right_16(S::load_bytes(p), 4);
    }
  }
  // The last eight bits of the stream end in the shared unit.
  Carry start_shared(const uint8_t* last, const uint8_t* shared, int half) const {
    I line[kLines + 1];
    half_lines(shared, half, line);
    const I before = kBits == 3 ? line[1] : S::load_bytes(last), end = line[kBits == 3 ? 2 : 1];
    return {S::rotate_dwords_8(S::template select_bits<0x0f>(S::shift_right_16(before, 4), S::shift_left_16(end, 4)))};
  }
  template <class Use>
  [[gnu::always_inline]] void shared(const uint8_t* p, int half, Carry& carry, Use&& use) const {
    I line[kLines + 1];
    line[0] = carry.before;
    half_lines(p, half, line);
    decode<4>(line, use);
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
  [[gnu::always_inline]] void decode(const I (&line)[kLines + 1], Use&& use) const {
    unrolled<Dwords>([&](auto j) __attribute__((always_inline)) {
      constexpr int kEnd = kBits * j + kBits - 1, kBit = kEnd % 8;
      const I here = line[kEnd / 8 + 1], before = line[kEnd / 8];
      I index = here;
      if constexpr (kBit != 7)
        index = S::template select_bits<(0xff << (7 - kBit)) & 0xff>(S::shift_left_16(here, 7 - kBit),
                                                                     S::shift_right_16(before, kBit + 1));
      const I change = S::exclusive_or(here, before);
      const I signs = kBit == 7 ? change : S::shift_left_16(change, 7 - kBit);
      use(j, S::negate_where_top_bit(S::look_up_128(table, index), signs));
    });
  }
};

}  // namespace
