// How a call of attend is cut into work items, and where they lie in its workspace: queries of the blocks of rows, what
// the items leave behind, and how far they have come.
#pragma once
#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>

#include "kernels/table.h"
#include "kvpack/attend.h"

namespace kvpack {

constexpr size_t align_up(size_t n) { return (n + 63) & ~size_t{63}; }

struct Plan {
  const AttendParams& p;
  RecordLayout record;
  CodecInfo key, value;
  int64_t group, rows, block_rows, row_blocks, chunks, chunk_tiles;
  int64_t packed = 0;  // tokens in tiles
  int32_t levels;      // of the query
  int32_t out_width;   // floats per row of output: coded values, then plain ones where the value codec is rotated
  bool key_mean, value_mean;
  size_t query_bytes, rotated_bytes, level_bytes, state_bytes, out_bytes;

  explicit Plan(const AttendParams& params)
      : p(params),
        record{layout_of(p.key_codec, p.key_dim, Side::key), layout_of(p.value_codec, p.value_dim, Side::value)},
        key(codecs()[static_cast<size_t>(CodecCode::unpack(p.key_codec).id)]),
        value(codecs()[static_cast<size_t>(CodecCode::unpack(p.value_codec).id)]) {
    if (p.kv_heads <= 0 || p.query_heads % p.kv_heads != 0)
      throw std::invalid_argument("attend: " + std::to_string(p.query_heads) + " query heads are not a multiple of " +
                                  std::to_string(p.kv_heads) + " KV heads");
    group = p.query_heads / p.kv_heads;
    levels = p.precision == Precision::high ? 2 : 1;
    for (int64_t t = 0; t < p.tiles; ++t) packed += p.counts[t];
    rows = group * p.query_tokens;
    block_rows = rows < kRowBlock ? rows : kRowBlock;
    row_blocks = block_rows == 0 ? 0 : (rows + block_rows - 1) / block_rows;
    const int64_t whole = p.batch * p.kv_heads * row_blocks;
    const int64_t range = std::clamp(whole * p.tiles / kFineItems, kLeastRange, kMostRange);
    const bool split = whole < kEnoughItems && p.tiles > range;
    chunks = split ? (p.tiles + range - 1) / range : 1;
    chunk_tiles = (p.tiles + chunks - 1) / chunks;
    out_width = static_cast<int32_t>(value.rotated ? record.value.width() + p.value_dim : p.value_dim);
    const auto n = static_cast<size_t>(block_rows), d = static_cast<size_t>(p.key_dim);
    key_mean = record.key.center != Center::none;
    value_mean = record.value.center != Center::none;
    query_bytes = align_up(n * d * 4);
    rotated_bytes = key_mean ? query_bytes : 0;
    level_bytes = n * static_cast<size_t>(record.key.parts) * sizeof(QueryRow);
    state_bytes = align_up(n * sizeof(SoftmaxRow));
    out_bytes = align_up(n * static_cast<size_t>(out_width) * 4);
  }
  int64_t blocks() const { return p.batch * p.kv_heads * row_blocks; }
  // [batch][range][head][rows]: heads whose parts of a page are neighbours, then rows that read the same.
  int64_t items() const { return blocks() * chunks; }
  // What is left behind per block: one of every range of tiles, and where there are several, one of sinks and exact
  // tokens before them.
  int64_t partials() const { return chunks == 1 ? 1 : chunks + 1; }
  size_t block_bytes() const { return query_bytes + rotated_bytes + level_bytes; }
  size_t item_bytes() const { return state_bytes + out_bytes; }
  // Behind queries and what items leave.
  size_t progress_at() const {
    return static_cast<size_t>(blocks()) * block_bytes() + static_cast<size_t>(blocks() * partials()) * item_bytes();
  }
  size_t bytes() const {
    return progress_at() + align_up(static_cast<size_t>(blocks()) * 4) + kLine + align_up(static_cast<size_t>(items()));
  }
};

// The queries of one block of rows, shared by its items.
struct Queries {
  float* query;      // [rows][key_dim], times scale * log2(e)
  float* rotated;    // the same in the rotated domain, where keys are centred
  QueryRow* levels;  // [part][rows], transformed and quantized
  int64_t rows;
  Queries(const Plan& plan, uint8_t* workspace, int64_t block) {
    uint8_t* at = workspace + static_cast<size_t>(block) * plan.block_bytes();
    query = reinterpret_cast<float*>(at);
    rotated = reinterpret_cast<float*>(at + plan.query_bytes);
    levels = reinterpret_cast<QueryRow*>(at + plan.query_bytes + plan.rotated_bytes);
    rows = plan.block_rows;
  }
  QueryRow* levels_of(int32_t part) const { return levels + part * rows; }
};

// What a range of tiles, or the sinks and exact tokens, leave behind. The latter come last where they are apart.
struct Partial {
  SoftmaxRow* state;
  float* out;
  Partial(const Plan& plan, uint8_t* workspace, int64_t block, int64_t n) {
    uint8_t* at = workspace + static_cast<size_t>(plan.blocks()) * plan.block_bytes() +
                  static_cast<size_t>(block * plan.partials() + n) * plan.item_bytes();
    state = reinterpret_cast<SoftmaxRow*>(at);
    out = reinterpret_cast<float*>(at + plan.state_bytes);
  }
};

// How far the work has come, between threads.
struct Progress {
  // Of a block: not begun, sinks and exact tokens at work, done; from there on, one more for each range that is done.
  static constexpr int32_t kNone = 0, kStarting = 1, kStarted = 2;
  std::atomic<int32_t>* block;
  std::atomic<int32_t>* left;   // items that no thread is at, or more
  std::atomic<uint8_t>* taken;  // those that one has

  Progress(const Plan& plan, uint8_t* workspace) {
    uint8_t* at = workspace + plan.progress_at();
    const int64_t blocks = plan.blocks(), items = plan.items();
    block = reinterpret_cast<std::atomic<int32_t>*>(at);
    at += align_up(static_cast<size_t>(blocks) * 4);
    left = reinterpret_cast<std::atomic<int32_t>*>(at);  // in a line of its own
    taken = reinterpret_cast<std::atomic<uint8_t>*>(at + kLine);
    for (int64_t i = 0; i < blocks; ++i) new (block + i) std::atomic<int32_t>(kNone);
    new (left) std::atomic<int32_t>(static_cast<int32_t>(items));
    for (int64_t i = 0; i < items; ++i) new (taken + i) std::atomic<uint8_t>(0);
  }
  // Whether nobody has taken the item before.
  bool take(int64_t item) const {
    std::atomic<uint8_t>& mark = taken[item];
    return mark.load(std::memory_order_relaxed) == 0 && mark.exchange(1, std::memory_order_relaxed) == 0;
  }
};

}  // namespace kvpack
