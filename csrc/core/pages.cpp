// Pages on many threads: one work item per (batch row, KV head, tile); the first exception is rethrown by the caller.
#include "kvpack/pages.h"

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

uint8_t* record_at(const PageTable& table, const RecordLayout& record, int64_t batch, int64_t head, int64_t tile) {
  const auto page = static_cast<uintptr_t>(table.addresses[batch * table.stride + tile / kPageTiles]);
  return reinterpret_cast<uint8_t*>(page) + static_cast<size_t>(head * kPageTiles + tile % kPageTiles) * record.bytes();
}

Vectors rows_of(const Strided& x, Dtype dtype, int64_t batch, int64_t head, int64_t token) {
  return {x.data + batch * x.batch + head * x.head + token * x.token, dtype, x.token};
}

}  // namespace

RecordLayout PageLayout::record() const {
  return {layout_of(key_codec, key_dim, Side::key), layout_of(value_codec, value_dim, Side::value)};
}

size_t PageLayout::page_bytes() const {
  if (kv_heads < 1) throw std::invalid_argument("kv_heads is " + std::to_string(kv_heads) + "; allowed: 1 or more");
  return static_cast<size_t>(kv_heads * kPageTiles) * record().bytes();
}

void encode_pages(const PageTable& table, const PageLayout& layout, const Strided& keys, const Strided& values,
                  Dtype dtype, int64_t first_tile, int64_t tiles, ParallelFor parallel) {
  const RecordLayout record = layout.record();
  check_pages(table, first_tile + tiles);
  for_each_tile(table.batch, layout.kv_heads, tiles, parallel, [&](int64_t b, int64_t h, int64_t t) {
    uint8_t* at = record_at(table, record, b, h, first_tile + t);
    const auto section = [at](size_t codes, size_t scales) {
      return TileSide{at + codes, reinterpret_cast<uint16_t*>(at + scales)};
    };
    encode_tile(rows_of(keys, dtype, b, h, t * kTile), kTile, layout.key_codec, static_cast<int32_t>(layout.key_dim),
                Side::key, section(record.key_codes(), record.key_scales()), t * kTile);
    encode_tile(rows_of(values, dtype, b, h, t * kTile), kTile, layout.value_codec,
                static_cast<int32_t>(layout.value_dim), Side::value,
                section(record.value_codes(), record.value_scales()), t * kTile);
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
    const uint8_t* at = record_at(table, record, b, h, t);
    const ConstTileSide tile{
        at + (key ? record.key_codes() : record.value_codes()),
        reinterpret_cast<const uint16_t*>(at + (key ? record.key_scales() : record.value_scales()))};
    uint8_t* to = out + ((b * layout.kv_heads + h) * start.back() + start[static_cast<size_t>(t)]) * row_bytes;
    decode_tile(tile, key ? layout.key_codec : layout.value_codec, d, side, counts[t], to, dtype, row_bytes);
  });
}

}  // namespace kvpack
