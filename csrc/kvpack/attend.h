// attend: attention of queries over packed tiles, sinks and exact tokens in one online softmax.
//
// Positions. A row's sequence has S sinks, the packed tokens and E exact tokens. The stream (packed, then exact) lies
// around the sinks: stream index i is position i before sink_start and i + S from there on. Mask columns are positions;
// positions below `pad` are masked always.
#pragma once
#include <atomic>

#include "kvpack/codec.h"

namespace kvpack {

constexpr int64_t kRowBlock = 64;     // query rows of one work item
constexpr int64_t kEnoughItems = 16;  // from this many items on, tile ranges are not split
// Otherwise they are, into equal ranges, at most as large as makes kFineItems items of the call, that bound kept within
// kLeastRange and kMostRange. Each range costs what its first tiles do, in which most tokens stand out and get a finer
// score: with ranges of 32 tiles 7 % (Zen 5, 16k tokens). They may begin in the middle of a page.
constexpr int64_t kFineItems = 32, kLeastRange = 32, kMostRange = 128;
// A thread takes the same range of neighbouring KV heads, and reads page by page: their parts of a page lie side by
// side (Zen 5, 16k tokens, d = 128, against one head after the other: tq4 10 %, q8_0 8 %, tcq3 5 %, exact 5 % faster).
// Fewer of them where threads would run out of work; one alone with more query rows than kFewRows, which wait for
// products and not for memory, and whose sums would not stay in L2.
constexpr int64_t kMostHeads = 8, kFewRows = 16;

// [batch, heads, tokens, dim] with strides in bytes; dim is contiguous.
struct Strided {
  const uint8_t* data = nullptr;
  ptrdiff_t batch = 0, head = 0, token = 0;
};

struct Mask {
  enum class Kind { none, boolean, additive } kind = Kind::none;
  const uint8_t* data = nullptr;
  Dtype dtype = Dtype::f32;                           // of an additive mask
  ptrdiff_t batch = 0, head = 0, token = 0, key = 0;  // bytes, 0 where broadcast
};

struct AttendParams {
  int64_t batch, query_heads, kv_heads, query_tokens, key_dim, value_dim;
  int64_t tiles, sinks, exact;
  int64_t key_codec, value_codec;
  Dtype dtype;  // of query, sinks, exact tokens and output
  Strided query, sink_keys, sink_values, keys, values;
  const int64_t* table;  // [batch][table_stride] page addresses
  int64_t table_stride;
  const int32_t* counts;  // [tiles] tokens per tile
  const int32_t* rows;    // [batch][2] pad, sink_start; may be null
  Mask mask;
  const float* sink_logits;  // [query_heads], may be null
  float scale, softcap;      // softcap 0: off
  bool causal;
  Precision precision;
  // Tiles whose values stay unread may together carry this share of a query row's probability; 0: only masked ones.
  float sparse_values = 0.0F;
  std::atomic<int64_t>* unread = nullptr;  // [2] counts up: tiles met by groups of query rows, values left unread
  int64_t threads = 1;                     // that will share the work; results do not depend on it
  uint8_t* out;                            // [batch, query_heads, query_tokens, value_dim], contiguous
};

// Bytes of scratch that attend() needs; the same for the same shapes, whatever the number of threads.
size_t attend_workspace(const AttendParams&);
void attend(const AttendParams&, uint8_t* workspace, ParallelFor parallel);

}  // namespace kvpack
