// Codes [64 tokens][head_dim], one byte each, to and from packed lines (format.h).
//
// Both sides go through the same dword matrix [depth/4][lane], four codes of consecutive depths per dword; a unit is
// then shifts and ors of whole dwords, lane by lane.
#pragma once
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
      for (int i = 0; i < head_dim; ++i)
        m[z * head_dim + i] = static_cast<uint32_t>(c[i]) | static_cast<uint32_t>(c[head_dim + i]) << 8 |
                              static_cast<uint32_t>(c[2 * head_dim + i]) << 16 |
                              static_cast<uint32_t>(c[3 * head_dim + i]) << 24;
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

// One unit of 16 lanes: c[j] are the dword rows of its depths. Stream: codes of 3 bits one after the other.
template <int Bits, bool Stream>
inline void pack_line(const uint32_t* const (&c)[kvpack::unit_dwords(Bits)], uint32_t* line) {
  for (int l = 0; l < 16; ++l) {
    if constexpr (Bits == 3 && Stream) {
      line[l] = c[0][l] | c[1][l] << 3 | (c[2][l] & every_byte(0x03)) << 6;
      line[16 + l] =
          (c[2][l] >> 2 & every_byte(0x01)) | c[3][l] << 1 | c[4][l] << 4 | (c[5][l] & every_byte(0x01)) << 7;
      line[32 + l] = (c[5][l] >> 1 & every_byte(0x03)) | c[6][l] << 2 | c[7][l] << 5;
    } else if constexpr (Bits == 5) {
      // Bit 4 of code j becomes bit j. Written out: GCC 12 loses the loop under UBSan.
      const uint32_t high = (c[0][l] >> 4 & every_byte(0x01)) | (c[1][l] >> 3 & every_byte(0x02)) |
                            (c[2][l] >> 2 & every_byte(0x04)) | (c[3][l] >> 1 & every_byte(0x08)) |
                            (c[4][l] & every_byte(0x10)) | (c[5][l] << 1 & every_byte(0x20)) |
                            (c[6][l] << 2 & every_byte(0x40)) | (c[7][l] << 3 & every_byte(0x80));
      for (int p = 0; p < 4; ++p)
        line[16 * p + l] = (c[2 * p][l] & every_byte(0x0f)) | (c[2 * p + 1][l] & every_byte(0x0f)) << 4;
      line[64 + l] = high;
    } else if constexpr (Bits == 3) {
      const uint32_t rest = c[6][l] | c[7][l] << 3;
      line[l] = c[0][l] | c[1][l] << 3 | (rest & every_byte(0x03)) << 6;
      line[16 + l] = c[2][l] | c[3][l] << 3 | (rest & every_byte(0x0c)) << 4;
      line[32 + l] = c[4][l] | c[5][l] << 3 | (rest & every_byte(0x30)) << 2;
    } else {
      uint32_t w = c[0][l];
      for (int j = 1; j < kvpack::unit_dwords(Bits); ++j) w |= c[j][l] << (Bits * j);
      line[l] = w;
    }
  }
}

template <int Bits, bool Stream>
inline void unpack_line(const uint32_t* line, uint32_t* const (&c)[kvpack::unit_dwords(Bits)]) {
  constexpr uint32_t kMask = every_byte((1U << Bits) - 1);
  for (int l = 0; l < 16; ++l) {
    if constexpr (Bits == 3 && Stream) {
      const uint32_t p = line[l], q = line[16 + l], r = line[32 + l];
      c[0][l] = p & kMask;
      c[1][l] = p >> 3 & kMask;
      c[2][l] = (p >> 6 & every_byte(0x03)) | (q & every_byte(0x01)) << 2;
      c[3][l] = q >> 1 & kMask;
      c[4][l] = q >> 4 & kMask;
      c[5][l] = (q >> 7 & every_byte(0x01)) | (r & every_byte(0x03)) << 1;
      c[6][l] = r >> 2 & kMask;
      c[7][l] = r >> 5 & kMask;
    } else if constexpr (Bits == 5) {
      for (int j = 0; j < 8; ++j)
        c[j][l] = (line[16 * (j / 2) + l] >> 4 * (j % 2) & every_byte(0x0f)) | (line[64 + l] >> j & every_byte(0x01))
                                                                                   << 4;
    } else if constexpr (Bits == 3) {
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
      for (int j = 0; j < kvpack::unit_dwords(Bits); ++j) c[j][l] = line[l] >> (Bits * j) & kMask;
    }
  }
}

// Runs line(pointer to the packed line, rows of its depths) over a code section.
template <int Bits, class Row, class Line>
inline void for_each_line(const kvpack::CodeGrid& grid, Row* m, Line&& line) {
  constexpr int kDwords = kvpack::unit_dwords(Bits);
  for (int sb = 0; sb < grid.superblocks(); ++sb)
    for (int u = 0; u < grid.units(); ++u)
      for (int b = 0; b < grid.lane_blocks(sb); ++b) {
        Row* c[kDwords];
        for (int j = 0; j < kDwords; ++j) c[j] = m + (u * kDwords + j) * grid.lanes + sb * 64 + b * 16;
        line(grid.line(sb, u, b), c);
      }
  if constexpr (kDwords == 8)
    for (int sb = 0; grid.shares() && sb < grid.superblocks(); ++sb)
      for (int pair = 0; pair < grid.lane_blocks(sb) / 2; ++pair) {
        Row* c[kDwords];
        for (int j = 0; j < kDwords; ++j)
          c[j] = m + (grid.units() * kDwords + j % 4) * grid.lanes + sb * 64 + (2 * pair + j / 4) * 16;
        line(grid.shared_line(sb, pair), c);
      }
}

template <int Bits, bool Stream>
void pack_codes(const uint8_t* codes, int head_dim, kvpack::Side side, uint8_t* packed) {
  alignas(64) DwordMatrix m;
  codes_to_dwords(codes, head_dim, side, m);
  const auto grid = kvpack::code_grid(Bits, head_dim, side);
  for_each_line<Bits>(grid, static_cast<const uint32_t*>(m),
                      [&](size_t at, const uint32_t* const(&c)[kvpack::unit_dwords(Bits)]) {
                        alignas(64) uint32_t line[16 * kvpack::unit_lines(Bits)];
                        pack_line<Bits, Stream>(c, line);
                        __builtin_memcpy(packed + at, line, sizeof line);
                      });
}

template <int Bits, bool Stream>
void unpack_codes(const uint8_t* packed, int head_dim, kvpack::Side side, uint8_t* codes) {
  alignas(64) DwordMatrix m;
  const auto grid = kvpack::code_grid(Bits, head_dim, side);
  for_each_line<Bits>(grid, static_cast<uint32_t*>(m), [&](size_t at, uint32_t* const(&c)[kvpack::unit_dwords(Bits)]) {
    alignas(64) uint32_t line[16 * kvpack::unit_lines(Bits)];
    __builtin_memcpy(line, packed + at, sizeof line);
    unpack_line<Bits, Stream>(line, c);
  });
  dwords_to_codes(m, head_dim, side, codes);
}

}  // namespace
