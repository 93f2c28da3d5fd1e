// Codes [64 tokens][head_dim], one byte each, to and from packed lines (format.h).
//
// Both sides go through the same dword matrix [depth/4][lane], four codes of consecutive depths per dword; a unit is
// then shifts and ors of whole dwords, lane by lane.
#pragma once
#include "kernels/blocking.inl.h"
#include "kernels/table.h"

namespace {

// Four rows of four dwords, transposed. Vector types of the compiler: SSE2 and NEON have these shuffles.
inline void transpose_4x4(const uint8_t* from, ptrdiff_t stride, uint32_t* to, ptrdiff_t to_stride) {
  using V = uint32_t __attribute__((vector_size(16), aligned(4)));
  V r[4], s[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&r[i], from + i * stride, sizeof r[i]);
  for (int i = 0; i < 2; ++i) {
    s[i] = __builtin_shufflevector(r[i], r[i + 2], 0, 4, 1, 5);
    s[i + 2] = __builtin_shufflevector(r[i], r[i + 2], 2, 6, 3, 7);
  }
  r[0] = __builtin_shufflevector(s[0], s[1], 0, 4, 1, 5);
  r[1] = __builtin_shufflevector(s[0], s[1], 2, 6, 3, 7);
  r[2] = __builtin_shufflevector(s[2], s[3], 0, 4, 1, 5);
  r[3] = __builtin_shufflevector(s[2], s[3], 2, 6, 3, 7);
  for (int i = 0; i < 4; ++i) __builtin_memcpy(to + i * to_stride, &r[i], sizeof r[i]);
}

// Four rows of 16 bytes as 16 dwords, a byte of each row in every one.
inline void interleave_4(const uint8_t* from, ptrdiff_t stride, uint32_t* to) {
  using V = uint8_t __attribute__((vector_size(16), aligned(1)));
  V r[4], s[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&r[i], from + i * stride, sizeof r[i]);
  for (int i = 0; i < 2; ++i) {  // rows 0 and 2, rows 1 and 3
    s[2 * i] = __builtin_shufflevector(r[i], r[i + 2], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    s[2 * i + 1] =
        __builtin_shufflevector(r[i], r[i + 2], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
  for (int i = 0; i < 2; ++i) {
    r[2 * i] = __builtin_shufflevector(s[i], s[i + 2], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    r[2 * i + 1] =
        __builtin_shufflevector(s[i], s[i + 2], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
  for (int i = 0; i < 4; ++i) __builtin_memcpy(to + 4 * i, &r[i], sizeof r[i]);
}

using DwordMatrix = uint32_t[kvpack::kTile * kvpack::kMaxHeadDim / 4];

inline void codes_to_dwords(const uint8_t* codes, int head_dim, kvpack::Side side, DwordMatrix& m) {
  using kvpack::kTile;
  if (side == kvpack::Side::key) {
    for (int t = 0; t < kTile; t += 4)
      for (int z = 0; z < head_dim / 4; z += 4)
        transpose_4x4(codes + t * head_dim + 4 * z, head_dim, m + z * kTile + t, kTile);
  } else {
    for (int z = 0; z < kTile / 4; ++z) {
      const uint8_t* c = codes + 4 * z * head_dim;
      for (int i = 0; i < head_dim; i += 16) interleave_4(c + i, head_dim, m + z * head_dim + i);
    }
  }
}

inline void dwords_to_codes(const DwordMatrix& m, int head_dim, kvpack::Side side, uint8_t* codes) {
  using kvpack::kTile;
  if (side == kvpack::Side::key) {
    for (int t = 0; t < kTile; ++t)
      for (int z = 0; z < head_dim / 4; ++z) __builtin_memcpy(codes + t * head_dim + 4 * z, &m[z * kTile + t], 4);
  } else {
    for (int z = 0; z < kTile / 4; ++z)
      for (int e = 0; e < 4; ++e)
        for (int i = 0; i < head_dim; ++i)
          codes[(4 * z + e) * head_dim + i] = static_cast<uint8_t>(m[z * head_dim + i] >> (8 * e));
  }
}

constexpr uint32_t every_byte(uint32_t b) { return b * 0x01010101U; }

// One unit of 16 lanes: c[j] are the dword rows of its depths. Widths come in half bits: templates take integers.
// Stream: one code after the other through the planes, code j from bit floor(bits * j) on.
template <int HalfBits, bool Stream>
struct UnitCodes {
  static constexpr double kBits = HalfBits / 2.0;
  static constexpr int kDwords = kvpack::unit_dwords(kBits), kLines = kvpack::unit_lines(kBits);

  // Code j begins in this plane and bit, and goes on in the next plane with bits from kInPlane on.
  template <int J>
  struct At {
    static constexpr int kFirst = HalfBits * J / 2, kCount = HalfBits * (J + 1) / 2 - kFirst;
    static constexpr int kPlane = kFirst / 8, kBit = kFirst % 8, kInPlane = 8 - kBit;
    static constexpr bool kSplit = kCount > kInPlane;
    static constexpr uint32_t kMask = every_byte((1U << (kSplit ? kInPlane : kCount)) - 1);
    static constexpr uint32_t kRest = every_byte((1U << (kSplit ? kCount - kInPlane : 0)) - 1);
  };

  static void pack(const uint32_t* const (&c)[kDwords], uint32_t* line) {
    for (int l = 0; l < 16; ++l) {
      if constexpr (HalfBits == 10) {
        // Bit 4 of code j becomes bit j. Written out: GCC 12 loses the loop under UBSan.
        const uint32_t high = (c[0][l] >> 4 & every_byte(0x01)) | (c[1][l] >> 3 & every_byte(0x02)) |
                              (c[2][l] >> 2 & every_byte(0x04)) | (c[3][l] >> 1 & every_byte(0x08)) |
                              (c[4][l] & every_byte(0x10)) | (c[5][l] << 1 & every_byte(0x20)) |
                              (c[6][l] << 2 & every_byte(0x40)) | (c[7][l] << 3 & every_byte(0x80));
        for (int p = 0; p < 4; ++p)
          line[16 * p + l] = (c[2 * p][l] & every_byte(0x0f)) | (c[2 * p + 1][l] & every_byte(0x0f)) << 4;
        line[64 + l] = high;
      } else if constexpr (HalfBits == 6 && !Stream) {
        const uint32_t rest = c[6][l] | c[7][l] << 3;
        line[l] = c[0][l] | c[1][l] << 3 | (rest & every_byte(0x03)) << 6;
        line[16 + l] = c[2][l] | c[3][l] << 3 | (rest & every_byte(0x0c)) << 4;
        line[32 + l] = c[4][l] | c[5][l] << 3 | (rest & every_byte(0x30)) << 2;
      } else {
        uint32_t plane[kLines] = {};
        unrolled<kDwords>([&](auto j) __attribute__((always_inline)) {
          using Code = At<j>;
          plane[Code::kPlane] |= (c[j][l] & Code::kMask) << Code::kBit;
          if constexpr (Code::kSplit) plane[Code::kPlane + 1] |= c[j][l] >> Code::kInPlane & Code::kRest;
        });
        for (int p = 0; p < kLines; ++p) line[16 * p + l] = plane[p];
      }
    }
  }

  static void unpack(const uint32_t* line, uint32_t* const (&c)[kDwords]) {
    for (int l = 0; l < 16; ++l) {
      if constexpr (HalfBits == 10) {
        for (int j = 0; j < 8; ++j)
          c[j][l] = (line[16 * (j / 2) + l] >> 4 * (j % 2) & every_byte(0x0f)) | (line[64 + l] >> j & every_byte(0x01))
                                                                                     << 4;
      } else if constexpr (HalfBits == 6 && !Stream) {
        constexpr uint32_t kMask = every_byte(0x07);
        const uint32_t p = line[l], q = line[16 + l], r = line[32 + l];
        const uint32_t rest = (p >> 6 & every_byte(0x03)) | (q >> 4 & every_byte(0x0c)) | (r >> 2 & every_byte(0x30));
        c[0][l] = p & kMask;
        c[1][l] = p >> 3 & kMask;
        c[2][l] = q & kMask;
        c[3][l] = q >> 3 & kMask;
        c[4][l] = r & kMask;
        c[5][l] = r >> 3 & kMask;
        c[6][l] = rest & kMask;
        c[7][l] = rest >> 3 & kMask;
      } else {
        unrolled<kDwords>([&](auto j) __attribute__((always_inline)) {
          using Code = At<j>;
          uint32_t code = line[16 * Code::kPlane + l] >> Code::kBit & Code::kMask;
          if constexpr (Code::kSplit) code |= (line[16 * (Code::kPlane + 1) + l] & Code::kRest) << Code::kInPlane;
          c[j][l] = code;
        });
      }
    }
  }
};

// Runs line(pointer to the packed line, rows of its depths) over a code section.
template <int Dwords, class Row, class Line>
inline void for_each_line(const kvpack::CodeGrid& grid, Row* m, Line&& line) {
  for (int sb = 0; sb < grid.superblocks(); ++sb)
    for (int u = 0; u < grid.units(); ++u)
      for (int b = 0; b < grid.lane_blocks(sb); ++b) {
        Row* c[Dwords];
        for (int j = 0; j < Dwords; ++j) c[j] = m + (u * Dwords + j) * grid.lanes + sb * 64 + b * 16;
        line(grid.line(sb, u, b), c);
      }
  if constexpr (Dwords >= 8)
    for (int sb = 0; sb < grid.superblocks(); ++sb)
      for (int part = 0; part < grid.parts(); ++part)
        for (int b = 0; b < grid.lane_blocks(sb); b += Dwords / 4) {
          Row* c[Dwords];
          for (int j = 0; j < Dwords; ++j)
            c[j] = m + (grid.units() * Dwords + part * 4 + j % 4) * grid.lanes + sb * 64 + (b + j / 4) * 16;
          line(grid.shared_line(sb, part, b), c);
        }
}

template <int HalfBits, bool Stream>
void pack_codes(const uint8_t* codes, int head_dim, kvpack::Side side, uint8_t* packed) {
  using Unit = UnitCodes<HalfBits, Stream>;
  alignas(64) DwordMatrix m;
  codes_to_dwords(codes, head_dim, side, m);
  const auto grid = kvpack::code_grid(Unit::kBits, head_dim, side);
  for_each_line<Unit::kDwords>(grid, static_cast<const uint32_t*>(m),
                               [&](size_t at, const uint32_t* const(&c)[Unit::kDwords]) {
                                 alignas(64) uint32_t line[16 * Unit::kLines];
                                 Unit::pack(c, line);
                                 __builtin_memcpy(packed + at, line, sizeof line);
                               });
}

template <int HalfBits, bool Stream>
void unpack_codes(const uint8_t* packed, int head_dim, kvpack::Side side, uint8_t* codes) {
  using Unit = UnitCodes<HalfBits, Stream>;
  alignas(64) DwordMatrix m;
  const auto grid = kvpack::code_grid(Unit::kBits, head_dim, side);
  for_each_line<Unit::kDwords>(grid, static_cast<uint32_t*>(m), [&](size_t at, uint32_t* const(&c)[Unit::kDwords]) {
    alignas(64) uint32_t line[16 * Unit::kLines];
    __builtin_memcpy(line, packed + at, sizeof line);
    Unit::unpack(line, c);
  });
  dwords_to_codes(m, head_dim, side, codes);
}

}  // namespace
