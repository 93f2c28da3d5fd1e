// Pages: encode into and decode from the tiles that a page table points at.
#pragma once
#include "kvpack/attend.h"
#include "kvpack/codec.h"

namespace kvpack {

struct PageLayout {
  int64_t key_codec, key_dim, value_codec, value_dim, kv_heads;
  RecordLayout record() const;
  size_t page_bytes() const;
};

struct PageTable {
  const int64_t* addresses;  // [batch][stride]
  int64_t batch, stride;
};

// Encodes `tiles` full tiles of keys and values ([batch, kv_heads, 64 * tiles, dim]) into slots first_tile... of every
// row. Throws std::invalid_argument, from the calling thread, for what encode_tile refuses and for missing pages.
void encode_pages(const PageTable&, const PageLayout&, const Strided& keys, const Strided& values, Dtype dtype,
                  int64_t first_tile, int64_t tiles, ParallelFor parallel);

// Decodes one side to [batch, kv_heads, sum(counts), dim], contiguous.
void decode_pages(const PageTable&, const PageLayout&, Side side, const int32_t* counts, int64_t tiles, Dtype dtype,
                  uint8_t* out, ParallelFor parallel);

}  // namespace kvpack
