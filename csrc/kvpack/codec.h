// Codecs on arrays: registry, sizes, encode, decode, rotate. Raw pointers; throws std::invalid_argument.
#pragma once
#include <span>
#include <string_view>

#include "kvpack/format.h"

namespace kvpack {

struct CodecInfo {
  int32_t id;
  std::string_view name;
  double bits;  // per value, scales not counted; 0: the bits of the element
  bool rotated, scale_rules, trellis;
  bool elements, asymmetric;  // codes laid out as those of `exact`; scales are steps and zeros
  int32_t scale_block;        // dims per scale, 0: the whole vector
  int32_t parts;
  bool projected, split;  // the second part is of the projected residual; the parts are channels, by a map
  std::string_view what, source;
};

std::span<const CodecInfo> codecs();

// Checks a codec code (id, rule, dtype) and a head size; the layout of one side of a tile.
SideLayout layout_of(int64_t codec, int64_t head_dim, Side side);

// Runs body(i) for i in 0..n-1, on whatever threads the caller has.
using ParallelFor = void (*)(int64_t n, void (*body)(void* context, int64_t i), void* context);
void serial_for(int64_t n, void (*body)(void* context, int64_t i), void* context);

// Vectors of the caller: element (token, dim) at data + token * stride + dim * dtype_bytes. Strides in bytes.
struct Vectors {
  const uint8_t* data;
  Dtype dtype;
  ptrdiff_t stride;
};

// One side of one tile: `tokens` vectors, the rest of the tile filled with zeros. Throws on NaN and Inf, and where a
// scale overflows fp16; `first_token` is added to token numbers in messages. Writes the mean of a side centred by tile;
// reads that of a row, and its map.
void encode_tile(const Vectors& x, int32_t tokens, int64_t codec, int32_t head_dim, Side side, TileSide out,
                 int64_t first_token);

// What is frozen at the first tile of a row with a vector that is not all zeros, from such a tile: the map of a split
// codec to out.map, the mean of a side centred by row to out.mean; each unless it is there already (in a row so far
// without, both are zeros). Throws likewise.
void freeze_row(const Vectors& x, int32_t tokens, int64_t codec, int32_t head_dim, Side side, TileSide out,
                int64_t first_token);

// One side of one tile to `tokens` vectors of `dtype`, row stride in bytes.
void decode_tile(ConstTileSide tile, int64_t codec, int32_t head_dim, Side side, int32_t tokens, uint8_t* out,
                 Dtype dtype, ptrdiff_t stride);

// Rows of tokens standing alone: n rows of `tokens` vectors, `stride` bytes between rows (tokens are contiguous).
//   tiles: [n][ceil(tokens / 64)][layout.bytes()]     means: [n][layout.means_of(tiles)][layout.mean_bytes()]
struct PackedRows {
  uint8_t* tiles;
  uint8_t* means;
};
void encode_rows(const Vectors& x, int64_t n, int64_t tokens, int64_t codec, int64_t head_dim, Side side,
                 const PackedRows& out);
void decode_rows(const PackedRows& packed, int64_t n, int64_t tokens, int64_t codec, int64_t head_dim, Side side,
                 uint8_t* out, Dtype dtype);

// Orthonormal randomized Hadamard rotation of rows, in place (inverse: its transpose).
void rotate_rows(float* x, int64_t rows, int64_t head_dim, bool inverse);

// The +-1 vector of a head size: splitmix64 from 0x6b767061636b0000 + head_dim, bit i % 64 of word i / 64.
const float* rotation_signs(int64_t head_dim);

// float32 <-> element conversions on rows.
void load_row(const uint8_t* from, Dtype dtype, int32_t n, float* to);
void store_row(const float* from, Dtype dtype, int32_t n, uint8_t* to);

}  // namespace kvpack
