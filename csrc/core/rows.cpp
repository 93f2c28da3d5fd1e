// Rows of tokens standing alone, as the Python interface of codecs wants them: whole tiles one after the other, and the
// means of centred codecs and the maps of split ones beside them.
#include <cstring>

#include "kvpack/codec.h"

namespace kvpack {
namespace {

// The tiles of one row.
struct Row {
  const SideLayout& layout;
  uint8_t* tiles;
  uint8_t* means;

  uint8_t* mean(int64_t number) const { return means + number * static_cast<int64_t>(layout.mean_bytes()); }
  TileSide tile(int64_t t) const {
    uint8_t* at = tiles + t * static_cast<int64_t>(layout.bytes());
    TileSide side{at + layout.scale_bytes, reinterpret_cast<uint16_t*>(at)};
    uint8_t* entry = mean(layout.mean_of(t));
    if (layout.center != Center::none) {
      side.mean = reinterpret_cast<int8_t*>(entry);
      side.mean_scale = reinterpret_cast<uint16_t*>(side.mean + layout.head_dim);
    }
    if (layout.map_bytes != 0) side.map = entry + layout.map_at();
    return side;
  }
};

Row row_at(const SideLayout& layout, const PackedRows& packed, int64_t i, int64_t tiles) {
  return {layout, packed.tiles + i * tiles * static_cast<int64_t>(layout.bytes()),
          packed.means + i * layout.means_of(tiles) * static_cast<int64_t>(layout.mean_bytes())};
}

}  // namespace

void encode_rows(const Vectors& x, int64_t n, int64_t tokens, int64_t codec, int64_t head_dim, Side side,
                 const PackedRows& out) {
  const SideLayout layout = layout_of(codec, head_dim, side);
  const int64_t tiles = (tokens + kTile - 1) / kTile;
  for (int64_t i = 0; i < n; ++i) {
    const Row row = row_at(layout, out, i, tiles);
    const auto each_tile = [&](auto&& body) {
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = t * kTile;
        const auto count = static_cast<int32_t>(tokens - first < kTile ? tokens - first : kTile);
        body(t, Vectors{x.data + (i * tokens + first) * x.stride, x.dtype, x.stride}, count, first);
      }
    };
    if (layout.frozen())
      each_tile([&](int64_t t, const Vectors& from, int32_t count, int64_t first) {
        const int64_t entry = layout.mean_of(t);
        if (t == 0) std::memset(row.mean(0), 0, layout.mean_bytes());
        if (t != 0 && layout.mean_of(t - 1) != entry)
          std::memcpy(row.mean(entry), row.mean(entry - 1), layout.mean_bytes());
        freeze_row(from, count, codec, layout.head_dim, side, row.tile(t), first);
      });
    each_tile([&](int64_t t, const Vectors& from, int32_t count, int64_t first) {
      encode_tile(from, count, codec, layout.head_dim, side, row.tile(t), first);
    });
  }
}

void decode_rows(const PackedRows& packed, int64_t n, int64_t tokens, int64_t codec, int64_t head_dim, Side side,
                 uint8_t* out, Dtype dtype) {
  const SideLayout layout = layout_of(codec, head_dim, side);
  const int64_t tiles = (tokens + kTile - 1) / kTile, row_bytes = head_dim * dtype_bytes(dtype);
  for (int64_t i = 0; i < n; ++i) {
    const Row row = row_at(layout, packed, i, tiles);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = t * kTile;
      const auto count = static_cast<int32_t>(tokens - first < kTile ? tokens - first : kTile);
      const TileSide tile = row.tile(t);
      decode_tile({tile.codes, tile.scales, tile.mean, tile.mean_scale, tile.map}, codec, layout.head_dim, side, count,
                  out + (i * tokens + first) * row_bytes, dtype, row_bytes);
    }
  }
}

}  // namespace kvpack
