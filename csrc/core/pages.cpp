// Pages on many threads: one work item per (batch row, KV head, tile); the first exception is rethrown by the caller.
#include "kvpack/pages.h"

#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace kvpack {
namespace {

// Runs body(batch, head, tile) in parallel; an exception must not leave a thread of the pool.
template <class Body>
void for_each_tile(int64_t batch, int64_t heads, int64_t tiles, ParallelFor parallel, Body&& body) {
  struct Context {
    Body& body;
    int64_t heads, tiles;
    std::mutex guard;
    std::exception_ptr error;
  } context{body, heads, tiles, {}, {}};
  parallel(
      batch * heads * tiles,
      [](void* p, int64_t i) {
        Context& c = *static_cast<Context*>(p);
        try {
          c.body(i / c.tiles / c.heads, i / c.tiles % c.heads, i % c.tiles);
        } catch (...) {
          const std::lock_guard lock(c.guard);
          if (!c.error) c.error = std::current_exception();
        }
      },
      &context);
  if (context.error) std::rethrow_exception(context.error);
}

void check_pages(const PageTable& table, int64_t tiles) {
  if (tiles > table.stride * kPageTiles)
    throw std::invalid_argument("page table of " + std::to_string(table.stride) + " pages a row has no tile " +
                                std::to_string(tiles - 1));
  for (int64_t b = 0; b < table.batch; ++b)
    for (int64_t i = 0; i * kPageTiles < tiles; ++i) {
      const int64_t page = table.addresses[b * table.stride + i];
      if (page == 0 || page % kLine != 0)
        throw std::invalid_argument("page " + std::to_string(i) + " of row " + std::to_string(b) +
                                    " has no 64-byte aligned address");
    }
}

// One side of one tile in its page.
TileSide tile_at(const PageTable& table, const RecordLayout& record, Side side, int64_t batch, int64_t head,
                 int64_t tile) {
  const auto page = static_cast<uintptr_t>(table.addresses[batch * table.stride + tile / kPageTiles]);
  uint8_t* own = reinterpret_cast<uint8_t*>(page) + static_cast<size_t>(head) * record.head_bytes();
  uint8_t* at = own + static_cast<size_t>(tile % kPageTiles) * record.bytes();
  const bool key = side == Side::key;
  TileSide out{at + (key ? record.key_codes() : record.value_codes()),
               reinterpret_cast<uint16_t*>(at + (key ? record.key_scales() : record.value_scales()))};
  const SideLayout& layout = key ? record.key : record.value;
  if (layout.center != Center::none) {
    out.mean = reinterpret_cast<int8_t*>(own + record.mean(side, tile % kPageTiles));
    out.mean_scale = reinterpret_cast<uint16_t*>(own + record.mean_scale(side, tile % kPageTiles));
  }
  if (layout.map_bytes != 0) out.map = own + record.map(side);
  return out;
}

}  // namespace

RecordLayout PageLayout::record() const {
  return {layout_of(key_codec, key_dim, Side::key), layout_of(value_codec, value_dim, Side::value)};
}

size_t PageLayout::page_bytes() const {
  if (kv_heads < 1) throw std::invalid_argument("kv_heads is " + std::to_string(kv_heads) + "; allowed: 1 or more");
  return static_cast<size_t>(kv_heads) * record().head_bytes();
}

namespace {

struct EncodePages {
  const PageTable& table;
  const PageLayout& layout;
  RecordLayout record;
  const Strided& keys;
  const Strided& values;
  Dtype dtype;
  int64_t first_tile, tiles;

  int64_t codec(Side side) const { return side == Side::key ? layout.key_codec : layout.value_codec; }
  Vectors rows(Side side, int64_t b, int64_t h, int64_t t) const {
    const Strided& x = side == Side::key ? keys : values;
    return {x.data + b * x.batch + h * x.head + t * kTile * x.token, dtype, x.token};
  }
  const SideLayout& side_layout(Side side) const { return side == Side::key ? record.key : record.value; }

  // The mean of a row and its map, frozen at its first tile with a token that is not all zeros (padding is), in every
  // page.
  void freeze(Side side, int64_t b, int64_t h) const {
    const SideLayout& s = side_layout(side);
    if (!s.frozen()) return;
    const bool mean = s.center == Center::mean;
    for (int64_t t = first_tile; t < first_tile + tiles; ++t) {
      const TileSide at = tile_at(table, record, side, b, h, t);
      if (t % kPageTiles == 0) {
        const auto d = static_cast<size_t>(s.head_dim);
        const TileSide before = t == 0 ? at : tile_at(table, record, side, b, h, t - 1);
        const auto take = [&](void* to, const void* from, size_t size) {
          t == 0 ? std::memset(to, 0, size) : std::memcpy(to, from, size);
        };
        if (mean) take(at.mean, before.mean, d);
        if (mean) take(at.mean_scale, before.mean_scale, sizeof *at.mean_scale);
        if (s.map_bytes != 0) take(at.map, before.map, s.map_bytes);
      }
      freeze_row(rows(side, b, h, t - first_tile), kTile, codec(side), s.head_dim, side, at, (t - first_tile) * kTile);
    }
  }
  void tile(Side side, int64_t b, int64_t h, int64_t t) const {
    encode_tile(rows(side, b, h, t), kTile, codec(side), side_layout(side).head_dim, side,
                tile_at(table, record, side, b, h, first_tile + t), t * kTile);
  }
};

}  // namespace

void encode_pages(const PageTable& table, const PageLayout& layout, const Strided& keys, const Strided& values,
                  Dtype dtype, int64_t first_tile, int64_t tiles, ParallelFor parallel) {
  const EncodePages call{table, layout, layout.record(), keys, values, dtype, first_tile, tiles};
  check_pages(table, first_tile + tiles);
  if (call.record.key.frozen() || call.record.value.frozen())
    for_each_tile(table.batch, layout.kv_heads, 1, parallel, [&](int64_t b, int64_t h, int64_t) {
      call.freeze(Side::key, b, h);
      call.freeze(Side::value, b, h);
    });
  for_each_tile(table.batch, layout.kv_heads, tiles, parallel, [&](int64_t b, int64_t h, int64_t t) {
    call.tile(Side::key, b, h, t);
    call.tile(Side::value, b, h, t);
  });
}

void decode_pages(const PageTable& table, const PageLayout& layout, Side side, const int32_t* counts, int64_t tiles,
                  Dtype dtype, uint8_t* out, ParallelFor parallel) {
  const RecordLayout record = layout.record();
  check_pages(table, tiles);
  std::vector<int64_t> start(static_cast<size_t>(tiles) + 1, 0);
  for (int64_t t = 0; t < tiles; ++t) {
    if (counts[t] < 1 || counts[t] > kTile)
      throw std::invalid_argument("tile " + std::to_string(t) + " counts " + std::to_string(counts[t]) +
                                  " tokens; allowed: 1..64");
    start[static_cast<size_t>(t) + 1] = start[static_cast<size_t>(t)] + counts[t];
  }
  const bool key = side == Side::key;
  const auto d = static_cast<int32_t>(key ? layout.key_dim : layout.value_dim);
  const ptrdiff_t row_bytes = static_cast<ptrdiff_t>(d) * dtype_bytes(dtype);
  for_each_tile(table.batch, layout.kv_heads, tiles, parallel, [&](int64_t b, int64_t h, int64_t t) {
    const TileSide at = tile_at(table, record, side, b, h, t);
    uint8_t* to = out + ((b * layout.kv_heads + h) * start.back() + start[static_cast<size_t>(t)]) * row_bytes;
    decode_tile({at.codes, at.scales, at.mean, at.mean_scale, at.map}, key ? layout.key_codec : layout.value_codec, d,
                side, counts[t], to, dtype, row_bytes);
  });
}

}  // namespace kvpack
