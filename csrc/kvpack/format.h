// THE packed format, version 1: where every byte of a tile lies. Canonical order; golden bytes are in tests/golden.
//
// A tile is 64 consecutive tokens of one (layer, batch row, KV head). Its record in a page:
//
//   | K scales | V scales | K codes | V codes |      every section a multiple of 64 bytes
//
//   scales   fp16 [scale block][token]: one row of 64 per scale block (none for `exact`; KIVI's: codecs/kivi.h)
//   codes    lines of 64 bytes = 16 lanes x 4 depths; codecs of two parts: those of the first, then of the second
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
// A *unit* is the run of depths that share one line (8, 4, 2, 1 bits), or as many as its codes fill:
//   8 bit: 1 dword of depths;  4 bit: 2;  2 bit: 4;  1 bit: 8;
//   3 bit: 8, "6+2": dwords 0..5 lie two by two in bits 0..5 of planes 0..2, dwords 6 and 7 make 6 bits whose pairs
//     fill bits 6..7 of the three planes; trellis codes: a plain stream of 24 bits through the three planes;
//   5 bit: 8: planes 0..3 hold the low four bits as at 4 bits, plane 4 the high bits as at 1 bit;
//   2.5 and 3.5 bit: 16, codes of 2 (3) bits in even dwords and of 3 (4) in odd ones: a plain stream of 40 (56) bits
//     through five (seven) planes.
// Lanes come in superblocks of 64 (the tile's tokens; 64 dims), inside one: [unit][lane block of 16][plane].
//
// A depth that is no multiple of a unit's (keys only) leaves *parts* of 4 dwords: one of 8 dwords at head sizes 80 and
// 112, one to three of 16 dwords at 80, 96, 112 and 160. As many neighbouring lane blocks as a unit has parts, 2 or 4,
// share one, after all whole units of the superblock, part after part:
//
//   shared unit n       dword:   0   1   2   3        4   5   6   7          of 2, or up to dword 15 of 4
//                       lanes:   those of block 2n    those of block 2n + 1
//
// `exact` stores elements, and `fp8` its codes likewise: keys [dim][64 tokens], values [64 tokens][dim].
//
// Page: [KV head] | record of slot 0 | 1 | 2 | 3 | means |
//
//   means    int8 in the rotated domain, of the sides that are centred: | K means | V means | K scales | V scales |,
//            each mean d bytes and an fp16 scale; four of a side centred by tile, one where the mean is the row's
//            (every page of the row carries a copy); then the maps of split codecs (codecs/split.h), | K map | V map |,
//            d / 8 bytes, copies in every page; all together filled up to 64 bytes
#pragma once
#include "kvpack/types.h"

namespace kvpack {

constexpr int32_t kFormatVersion = 1;

constexpr bool half_bit(double bits) { return bits == 2.5 || bits == 3.5; }
constexpr int32_t unit_dwords(double bits) {
  return bits == 8 ? 1 : bits == 4 ? 2 : bits == 2 ? 4 : half_bit(bits) ? 16 : 8;
}
constexpr int32_t unit_lines(double bits) {
  return static_cast<int32_t>(half_bit(bits) ? 2 * bits : bits == 3 || bits == 5 ? bits : 1);
}
// Lane blocks that share a unit where the depth leaves parts of one.
constexpr int32_t unit_sharers(double bits) { return unit_dwords(bits) > 4 ? unit_dwords(bits) / 4 : 1; }

// The shape of a section of codes of one width: of the code section of a codec that has one width.
struct CodeGrid {
  double bits;
  int32_t lanes, depth;
  constexpr int32_t units() const { return depth / (4 * unit_dwords(bits)); }       // whole ones
  constexpr int32_t parts() const { return depth % (4 * unit_dwords(bits)) / 16; }  // that lie in shared units
  constexpr int32_t superblocks() const { return (lanes + 63) / 64; }
  constexpr int32_t lane_blocks(int32_t sb) const { return (lanes - 64 * sb >= 64 ? 64 : lanes - 64 * sb) / 16; }
  // Bytes of a full superblock, hence the stride between superblocks.
  constexpr size_t superblock_bytes() const {
    return size_t{4} * static_cast<size_t>(depth * static_cast<int32_t>(2 * bits));
  }
  // First line of (superblock, unit, lane block).
  constexpr size_t line(int32_t sb, int32_t unit, int32_t block) const {
    return sb * superblock_bytes() + static_cast<size_t>((unit * lane_blocks(sb) + block) * unit_lines(bits)) * kLine;
  }
  // First line of the unit where a lane block has a part, with its neighbours.
  constexpr size_t shared_line(int32_t sb, int32_t part, int32_t block) const {
    const int32_t n = (part * lane_blocks(sb) + block) / unit_sharers(bits);
    return line(sb, units(), 0) + static_cast<size_t>(n * unit_lines(bits)) * kLine;
  }
};
constexpr CodeGrid code_grid(double bits, int32_t head_dim, Side side) {
  return side == Side::key ? CodeGrid{bits, kTile, head_dim} : CodeGrid{bits, head_dim, kTile};
}

// Codes of one width for a run of values of the transformed vector, read by the kernels of a codec that has no others.
struct CodePart {
  int32_t reader;        // id of that codec
  int32_t first, dims;   // the run
  size_t scales, codes;  // where its scales and codes begin, in scales and in bytes
};

// Where the sections of one side of a tile lie, standing alone (a Packed array) or inside a record.
struct SideLayout {
  double bits;
  int32_t head_dim;
  Side side;
  Center center;
  size_t scale_bytes, code_bytes;
  int32_t parts;
  CodePart part[kMaxParts];
  size_t map_bytes;  // of a split codec's map of channels, else 0
  constexpr int32_t width() const { return part[parts - 1].first + part[parts - 1].dims; }  // of the parts together
  constexpr size_t bytes() const { return scale_bytes + code_bytes; }
  // Means of a page; bytes of them with their scales, and of the map.
  constexpr int32_t means() const { return center == Center::tile ? kPageTiles : center == Center::mean ? 1 : 0; }
  constexpr size_t page_means() const {
    return static_cast<size_t>(means()) * (static_cast<size_t>(head_dim) + 2) + map_bytes;
  }
  // Standing alone, `tiles` tiles have so many entries of a mean with its scale, if any, and the map.
  constexpr int64_t means_of(int64_t tiles) const {
    if (center == Center::tile) return tiles;
    return center == Center::mean || map_bytes != 0 ? (tiles + kPageTiles - 1) / kPageTiles : 0;
  }
  constexpr size_t map_at() const {  // in an entry
    return center == Center::none && map_bytes != 0 ? 0 : static_cast<size_t>(head_dim) + 2;
  }
  constexpr size_t mean_bytes() const { return map_at() + map_bytes; }
  // Which of the means or entries is that of a tile.
  constexpr int64_t mean_of(int64_t tile) const { return center == Center::tile ? tile : tile / kPageTiles; }
  // Whether the row's first tile decides about something.
  constexpr bool frozen() const { return center == Center::mean || map_bytes != 0; }
};

// Offsets in the part of a page that belongs to one KV head.
struct RecordLayout {
  SideLayout key, value;
  constexpr size_t key_scales() const { return 0; }
  constexpr size_t value_scales() const { return key.scale_bytes; }
  constexpr size_t key_codes() const { return value_scales() + value.scale_bytes; }
  constexpr size_t value_codes() const { return key_codes() + key.code_bytes; }
  constexpr size_t bytes() const { return key.bytes() + value.bytes(); }

  constexpr size_t means() const { return kPageTiles * bytes(); }
  constexpr size_t means_bytes() const { return (key.page_means() + value.page_means() + kLine - 1) / kLine * kLine; }
  constexpr size_t head_bytes() const { return means() + means_bytes(); }
  // The mean of a side that serves `slot`, and its scale.
  constexpr size_t mean(Side side, int64_t slot) const {
    const size_t keys = side == Side::key ? 0 : static_cast<size_t>(key.means()) * static_cast<size_t>(key.head_dim);
    const SideLayout& s = side == Side::key ? key : value;
    return means() + keys + static_cast<size_t>(s.mean_of(slot)) * static_cast<size_t>(s.head_dim);
  }
  constexpr size_t mean_scale(Side side, int64_t slot) const {
    const size_t codes = static_cast<size_t>(key.means()) * static_cast<size_t>(key.head_dim) +
                         static_cast<size_t>(value.means()) * static_cast<size_t>(value.head_dim);
    const size_t keys = side == Side::key ? 0 : static_cast<size_t>(key.means());
    return means() + codes + 2 * (keys + static_cast<size_t>((side == Side::key ? key : value).mean_of(slot)));
  }
  constexpr size_t map(Side side) const {
    const size_t both = key.page_means() - key.map_bytes + value.page_means() - value.map_bytes;
    return means() + both + (side == Side::key ? 0 : key.map_bytes);
  }
};

// Pointers to the sections of one side of one tile; the mean and the map are null where there is none.
struct TileSide {
  uint8_t* codes;
  uint16_t* scales;
  int8_t* mean = nullptr;
  uint16_t* mean_scale = nullptr;
  uint8_t* map = nullptr;
};
struct ConstTileSide {
  const uint8_t* codes;
  const uint16_t* scales;
  const int8_t* mean = nullptr;
  const uint16_t* mean_scale = nullptr;
  const uint8_t* map = nullptr;
};

static_assert(CodeGrid{4, 64, 128}.superblock_bytes() == 4096 && CodeGrid{3, 128, 64}.line(1, 0, 0) == 1536);
static_assert(CodeGrid{3, 64, 80}.shared_line(0, 0, 2) == 1728 && CodeGrid{3, 64, 80}.superblock_bytes() == 1920);
static_assert(CodeGrid{2.5, 64, 96}.shared_line(0, 1, 3) == 1600 && CodeGrid{2.5, 64, 96}.superblock_bytes() == 1920);

}  // namespace kvpack
