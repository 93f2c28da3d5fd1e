// THE packed format, version 1: where every byte of a tile lies. Canonical order; golden bytes are in tests/golden.
//
// A tile is 64 consecutive tokens of one (layer, batch row, KV head). Its record in a page:
//
//   | K scales | V scales | K mean | V mean | K codes | V codes |      every section a multiple of 64 bytes
//
//   scales   fp16 [scale block][token]: one row of 64 per scale block (none for `exact`)
//   mean     room for an int8 mean (centring); zero bytes in version 1
//   codes    lines of 64 bytes = 16 lanes x 4 depths
//
// Codes have a lane axis and a depth axis. Keys: lane = token, depth = dim. Values: lane = dim, depth = token. So a
// 16-lane line holds one dword per lane with 4 consecutive depths, which is what a 4-way int8 dot instruction eats:
// scores and outputs both accumulate in lanes, without horizontal sums.
//
//   key line (4 bit)    lane:    token 0          token 1        ...   token 15
//                       byte:    0   1   2   3    0   1   2   3
//                       low  4:  d0  d1  d2  d3   d0  d1  d2  d3       code << 0
//                       high 4:  d4  d5  d6  d7   d4  d5  d6  d7       code << 4
//
// A *unit* is the run of depths that share one line (8, 4, 2 bits) or three (3 bits):
//   8 bit: 1 dword of depths;  4 bit: 2;  2 bit: 4;  3 bit: 8, "6+2": dwords 0..5 lie two by two in bits 0..5 of
//   planes 0..2, dwords 6 and 7 make 6 bits whose pairs fill bits 6..7 of the three planes.
// Lanes come in superblocks of 64 (the tile's tokens; 64 dims), inside one: [unit][lane block of 16][plane].
//
// A depth of 16 mod 32 (keys of head sizes 80 and 112) leaves half a unit of 8 dwords. Two neighbouring lane blocks
// share one, after all whole units of the superblock:
//
//   shared unit n       dword:   0   1   2   3        4   5   6   7
//                       lanes:   those of block 2n    those of block 2n + 1
//
// `exact` stores elements: keys [dim][64 tokens], values [64 tokens][dim].
//
// Page: [KV head][slot 0..3][record].
#pragma once
#include "kvpack/types.h"

namespace kvpack {

constexpr int32_t kFormatVersion = 1;

constexpr int32_t unit_dwords(int32_t bits) { return bits == 8 ? 1 : bits == 4 ? 2 : bits == 2 ? 4 : 8; }
constexpr int32_t unit_lines(int32_t bits) { return bits == 3 ? 3 : 1; }

// The shape of the code section of one side.
struct CodeGrid {
  int32_t bits, lanes, depth;
  constexpr int32_t units() const { return depth / (4 * unit_dwords(bits)); }  // whole ones
  // Whether lane blocks share their last unit two by two: half a unit of depths is left.
  constexpr bool shares() const { return depth % (4 * unit_dwords(bits)) != 0; }
  constexpr int32_t superblocks() const { return (lanes + 63) / 64; }
  constexpr int32_t lane_blocks(int32_t sb) const { return (lanes - 64 * sb >= 64 ? 64 : lanes - 64 * sb) / 16; }
  // Bytes of a full superblock, hence the stride between superblocks.
  constexpr size_t superblock_bytes() const { return size_t{8} * static_cast<size_t>(depth * bits); }
  // First line of (superblock, unit, lane block).
  constexpr size_t line(int32_t sb, int32_t unit, int32_t block) const {
    return sb * superblock_bytes() + static_cast<size_t>((unit * lane_blocks(sb) + block) * unit_lines(bits)) * kLine;
  }
  // First line of the unit that the lane blocks 2 * pair and 2 * pair + 1 of a superblock share.
  constexpr size_t shared_line(int32_t sb, int32_t pair) const {
    return line(sb, units(), 0) + static_cast<size_t>(pair * unit_lines(bits)) * kLine;
  }
};

// Where the sections of one side of a tile lie, standing alone (a Packed array) or inside a record.
struct SideLayout {
  int32_t bits, scale_blocks, head_dim;
  Side side;
  size_t scale_bytes, mean_bytes, code_bytes;
  constexpr size_t bytes() const { return scale_bytes + mean_bytes + code_bytes; }
  constexpr CodeGrid grid() const {
    return side == Side::key ? CodeGrid{bits, kTile, head_dim} : CodeGrid{bits, head_dim, kTile};
  }
};

constexpr SideLayout side_layout(int32_t bits, int32_t scale_blocks, int32_t head_dim, Side side, Dtype dtype) {
  const size_t values = static_cast<size_t>(kTile) * static_cast<size_t>(head_dim);
  return {bits,
          scale_blocks,
          head_dim,
          side,
          static_cast<size_t>(scale_blocks) * kTile * 2,
          0,
          bits == 0 ? values * static_cast<size_t>(dtype_bytes(dtype)) : values * static_cast<size_t>(bits) / 8};
}

// Offsets of the six sections of a record.
struct RecordLayout {
  SideLayout key, value;
  constexpr size_t key_scales() const { return 0; }
  constexpr size_t value_scales() const { return key.scale_bytes; }
  constexpr size_t key_mean() const { return value_scales() + value.scale_bytes; }
  constexpr size_t value_mean() const { return key_mean() + key.mean_bytes; }
  constexpr size_t key_codes() const { return value_mean() + value.mean_bytes; }
  constexpr size_t value_codes() const { return key_codes() + key.code_bytes; }
  constexpr size_t bytes() const { return key.bytes() + value.bytes(); }
};

// Pointers to the sections of one side of one tile.
struct TileSide {
  uint8_t* codes;
  uint16_t* scales;
};
struct ConstTileSide {
  const uint8_t* codes;
  const uint16_t* scales;
};

static_assert(CodeGrid{4, 64, 128}.superblock_bytes() == 4096 && CodeGrid{3, 128, 64}.line(1, 0, 0) == 1536);
static_assert(CodeGrid{3, 64, 80}.shared_line(0, 1) == 1728 && CodeGrid{3, 64, 80}.superblock_bytes() == 1920);

}  // namespace kvpack
