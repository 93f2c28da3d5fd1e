// CPU implementations of the kvpack operators through the LibTorch stable ABI. Schemas, fakes and defaults are in
// python/kvpack/ops. Checks, allocates, unpacks pointers, calls; no arithmetic.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kvpack/attend.h"
#include "kvpack/codec.h"
#include "kvpack/isa.h"
#include "kvpack/pages.h"

namespace {

using namespace kvpack;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

void torch_for(int64_t n, void (*body)(void*, int64_t), void* context) {
  if (n == 1) return body(context, 0);
  torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

Dtype dtype_of(ScalarType type, const char* what) {
  switch (type) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    default: fail(std::string(what) + ": dtype is not supported; allowed: float32, float16, bfloat16");
  }
}

std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i != 0 ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

Side side_of(int64_t side) {
  if (side != 0 && side != 1) fail("side is " + std::to_string(side) + "; allowed: 0 (key), 1 (value)");
  return static_cast<Side>(side);
}

PageLayout layout_from(const std::vector<int64_t>& v) {
  if (v.size() != 5)
    fail("layout has " + std::to_string(v.size()) +
         " entries; it is [key_codec, key_dim, value_codec, value_dim, kv_heads]");
  return {v[0], v[1], v[2], v[3], v[4]};
}

template <class T>
const T* typed(const Tensor& t, ScalarType type, const char* what) {
  if (t.scalar_type() != type || !t.is_contiguous())
    fail(std::string(what) + " " + shape_of(t) + " must be contiguous and of its documented dtype");
  return static_cast<const T*>(t.data_ptr());
}

// A [batch, heads, tokens, dim] tensor with a contiguous last dimension.
Tensor rows_tensor(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t); }

Strided strided(const Tensor& t, Dtype dtype) {
  const ptrdiff_t size = dtype_bytes(dtype);
  return {static_cast<const uint8_t*>(t.data_ptr()), t.stride(0) * size, t.stride(1) * size, t.stride(2) * size};
}

void expect(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType type, const char* what) {
  bool same = t.dim() == static_cast<int64_t>(shape.size()) && t.scalar_type() == type;
  for (size_t i = 0; same && i < shape.size(); ++i) {
    const int64_t wanted = shape.begin()[i];
    same = wanted < 0 || t.size(static_cast<int64_t>(i)) == wanted;
  }
  if (same) return;
  std::string wanted;
  for (const int64_t n : shape)
    wanted += (wanted.empty() ? "" : ", ") + (n < 0 ? std::string("any") : std::to_string(n));
  fail(std::string(what) + " is " + shape_of(t) + "; expected [" + wanted + "] and the dtype of the other arguments");
}

PageTable table_of(const Tensor& table) {
  if (table.dim() != 2) fail("table is " + shape_of(table) + "; it is [batch, pages]");
  return {typed<int64_t>(table, ScalarType::Long, "table"), table.size(0), table.size(1)};
}

// Tiles [..., tiles, side_bytes] and means [..., means, mean_bytes].
std::tuple<Tensor, Tensor> encode(const Tensor& x_in, int64_t codec, int64_t side) {
  if (x_in.dim() < 2) fail("encode: x is " + shape_of(x_in) + "; it is [..., tokens, head_dim]");
  const Dtype dtype = dtype_of(x_in.scalar_type(), "encode");
  const Tensor x = torch::stable::contiguous(x_in);
  const int64_t d = x.size(-1), tokens = x.size(-2), tiles = (tokens + kTile - 1) / kTile;
  const SideLayout layout = layout_of(codec, d, side_of(side));
  std::vector<int64_t> shape, mean_shape;
  int64_t n = 1;
  for (int64_t i = 0; i + 2 < x.dim(); ++i) {
    shape.push_back(x.size(i));
    n *= x.size(i);
  }
  mean_shape = shape;
  shape.insert(shape.end(), {tiles, static_cast<int64_t>(layout.bytes())});
  mean_shape.insert(mean_shape.end(), {layout.means_of(tiles), static_cast<int64_t>(layout.mean_bytes())});
  Tensor out = torch::stable::new_empty(x, shape, ScalarType::Byte);
  Tensor means = torch::stable::new_empty(x, mean_shape, ScalarType::Byte);
  encode_rows({static_cast<const uint8_t*>(x.data_ptr()), dtype, d * dtype_bytes(dtype)}, n, tokens, codec, d,
              layout.side,
              {static_cast<uint8_t*>(out.mutable_data_ptr()), static_cast<uint8_t*>(means.mutable_data_ptr())});
  return {out, means};
}

Tensor decode(const Tensor& packed_in, const Tensor& means_in, int64_t codec, int64_t side, int64_t tokens,
              int64_t head_dim, ScalarType type) {
  const SideLayout layout = layout_of(codec, head_dim, side_of(side));
  const Dtype dtype = dtype_of(type, "decode");
  const int64_t tiles = (tokens + kTile - 1) / kTile, dims = packed_in.dim();
  if (tokens < 0 || packed_in.scalar_type() != ScalarType::Byte || dims < 2 ||
      packed_in.size(dims - 1) != static_cast<int64_t>(layout.bytes()) || packed_in.size(dims - 2) != tiles)
    fail("decode: packed is " + shape_of(packed_in) + "; expected uint8 [..., " + std::to_string(tiles) + ", " +
         std::to_string(layout.bytes()) + "] for " + std::to_string(tokens) + " tokens");
  const Tensor packed = torch::stable::contiguous(packed_in), means = torch::stable::contiguous(means_in);
  std::vector<int64_t> shape;
  int64_t n = 1;
  for (int64_t i = 0; i + 2 < dims; ++i) {
    shape.push_back(packed.size(i));
    n *= packed.size(i);
  }
  const int64_t wanted = n * layout.means_of(tiles) * static_cast<int64_t>(layout.mean_bytes());
  if (means.scalar_type() != ScalarType::Byte || means.numel() != wanted)
    fail("decode: means is " + shape_of(means) + "; expected uint8 [..., " + std::to_string(layout.means_of(tiles)) +
         ", " + std::to_string(layout.mean_bytes()) + "]");
  shape.push_back(tokens);
  shape.push_back(head_dim);
  Tensor out = torch::stable::new_empty(packed, shape, type);
  const auto bytes = [](const Tensor& t) { return const_cast<uint8_t*>(static_cast<const uint8_t*>(t.data_ptr())); };
  decode_rows({bytes(packed), bytes(means)}, n, tokens, codec, head_dim, layout.side,
              static_cast<uint8_t*>(out.mutable_data_ptr()), dtype);
  return out;
}

Tensor rotate(const Tensor& x_in, bool inverse) {
  if (x_in.dim() < 1) fail("rotate: x is a scalar; it is [..., head_dim]");
  const Dtype dtype = dtype_of(x_in.scalar_type(), "rotate");
  const Tensor x = torch::stable::contiguous(x_in);
  const auto d = static_cast<int32_t>(x.size(-1));
  (void)rotation_signs(d);
  Tensor out = torch::stable::empty_like(x);
  const auto* from = static_cast<const uint8_t*>(x.data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  float row[kMaxHeadDim];
  const ptrdiff_t bytes = static_cast<ptrdiff_t>(d) * dtype_bytes(dtype);
  for (int64_t r = 0; r < x.numel() / d; ++r) {
    load_row(from + r * bytes, dtype, d, row);
    rotate_rows(row, 1, d, inverse);
    store_row(row, dtype, d, to + r * bytes);
  }
  return out;
}

// The table is declared mutated: it stands for the pages it points at.
void encode_pages_op(Tensor table, const Tensor& keys_in, const Tensor& values_in, int64_t first_tile,
                     std::vector<int64_t> layout_list) {
  const PageLayout layout = layout_from(layout_list);
  const PageTable pages = table_of(table);
  if (keys_in.dim() != 4 || values_in.dim() != 4)
    fail("encode_pages: keys and values are [batch, kv_heads, tokens, head_dim]");
  const Dtype dtype = dtype_of(keys_in.scalar_type(), "encode_pages");
  const int64_t tokens = keys_in.size(2);
  expect(keys_in, {pages.batch, layout.kv_heads, tokens, layout.key_dim}, keys_in.scalar_type(), "encode_pages: keys");
  expect(values_in, {pages.batch, layout.kv_heads, tokens, layout.value_dim}, keys_in.scalar_type(),
         "encode_pages: values");
  if (first_tile < 0 || tokens % kTile != 0)
    fail("encode_pages: " + std::to_string(tokens) + " tokens from tile " + std::to_string(first_tile) +
         "; whole tiles of 64 only");
  const Tensor keys = rows_tensor(keys_in), values = rows_tensor(values_in);
  encode_pages(pages, layout, strided(keys, dtype), strided(values, dtype), dtype, first_tile, tokens / kTile,
               torch_for);
}

// Copies tokens into a buffer of one side.
void append_side(const Tensor& buffer, const Tensor& tokens_in, int64_t begin, const char* what) {
  if (buffer.dim() != 4 || tokens_in.dim() != 4)
    fail(std::string("append: ") + what + " and their buffer are [batch, kv_heads, tokens, head_dim]");
  const int64_t n = tokens_in.size(2);
  expect(tokens_in, {buffer.size(0), buffer.size(1), n, buffer.size(3)}, buffer.scalar_type(), what);
  if (begin < 0 || begin + n > buffer.size(2))
    fail("append: tokens " + std::to_string(begin) + ".." + std::to_string(begin + n - 1) + " of " + what +
         " do not lie in the buffer; allowed: 0.." + std::to_string(buffer.size(2) - 1));
  if (buffer.size(3) > 1 && buffer.stride(3) != 1) fail("append: a buffer's last dimension must be contiguous");
  const Dtype dtype = dtype_of(buffer.scalar_type(), "append");
  const Tensor tokens = rows_tensor(tokens_in);
  const Strided from = strided(tokens, dtype), to = strided(buffer, dtype);
  const auto bytes = static_cast<size_t>(buffer.size(3) * dtype_bytes(dtype));
  auto* base = static_cast<uint8_t*>(buffer.mutable_data_ptr());
  for (int64_t b = 0; b < buffer.size(0); ++b)
    for (int64_t h = 0; h < buffer.size(1); ++h)
      for (int64_t t = 0; t < n; ++t)
        std::memcpy(base + b * to.batch + h * to.head + (begin + t) * to.token,
                    from.data + b * from.batch + h * from.head + t * from.token, bytes);
}

void append(Tensor key_buffer, Tensor value_buffer, const Tensor& keys, const Tensor& values, int64_t begin) {
  if (keys.dim() == 4 && values.dim() == 4 && keys.size(2) != values.size(2))
    fail("append: keys have " + std::to_string(keys.size(2)) + " tokens, values " + std::to_string(values.size(2)));
  append_side(key_buffer, keys, begin, "keys");
  append_side(value_buffer, values, begin, "values");
}

Tensor decode_pages_op(const Tensor& table, const Tensor& counts, int64_t side, std::vector<int64_t> layout_list,
                       ScalarType type) {
  const PageLayout layout = layout_from(layout_list);
  const PageTable pages = table_of(table);
  const Dtype dtype = dtype_of(type, "decode_pages");
  const auto* count = typed<int32_t>(counts, ScalarType::Int, "counts");
  const int64_t tiles = counts.numel();
  int64_t tokens = 0;
  for (int64_t t = 0; t < tiles; ++t) tokens += count[t] > 0 ? count[t] : 0;
  Tensor out = torch::stable::new_empty(
      table, {pages.batch, layout.kv_heads, tokens, side_of(side) == Side::key ? layout.key_dim : layout.value_dim},
      type);
  decode_pages(pages, layout, side_of(side), count, tiles, dtype, static_cast<uint8_t*>(out.mutable_data_ptr()),
               torch_for);
  return out;
}

Mask mask_of(const std::optional<Tensor>& mask, const AttendParams& p) {
  Mask m;
  if (!mask.has_value()) return m;
  const Tensor& t = *mask;
  const bool boolean = t.scalar_type() == ScalarType::Bool;
  int64_t packed = 0;
  for (int64_t i = 0; i < p.tiles; ++i) packed += p.counts[i];
  const int64_t want[4] = {p.batch, p.query_heads, p.query_tokens, p.sinks + packed + p.exact};
  bool fits = t.dim() == 4 && t.size(3) == want[3];
  for (int i = 0; fits && i < 3; ++i) fits = t.size(i) == 1 || t.size(i) == want[i];
  if (!fits)
    fail("attend: mask is " + shape_of(t) + "; expected [" + std::to_string(want[0]) + " or 1, " +
         std::to_string(want[1]) + " or 1, " + std::to_string(want[2]) + " or 1, " + std::to_string(want[3]) + "]");
  m.kind = boolean ? Mask::Kind::boolean : Mask::Kind::additive;
  m.dtype = boolean ? Dtype::f32 : dtype_of(t.scalar_type(), "attend: mask");
  m.data = static_cast<const uint8_t*>(t.data_ptr());
  const ptrdiff_t size = boolean ? 1 : dtype_bytes(m.dtype);
  const auto step = [&](int i) { return t.size(i) == 1 ? 0 : t.stride(i) * size; };
  m.batch = step(0);
  m.head = step(1);
  m.token = step(2);
  m.key = t.stride(3) * size;
  return m;
}

// Keys and values of one kind of exact tokens (sinks, or window and own tokens); both or neither.
struct Exact {
  std::optional<Tensor> keys, values;
  int64_t tokens = 0;
  // count: those that there are, where the tensors have room for more; -1: all.
  Exact(const std::optional<Tensor>& k, const std::optional<Tensor>& v, int64_t batch, const PageLayout& layout,
        ScalarType type, const char* what, int64_t count = -1) {
    const int64_t room = k.has_value() && k->dim() == 4 ? k->size(2) : 0;
    if (count < -1 || count > room)
      fail(std::string("attend: exact is ") + std::to_string(count) + "; allowed: -1 (all), 0 to " +
           std::to_string(room) + ", the tokens of keys and values");
    if (k.has_value() != v.has_value()) fail(std::string("attend: ") + what + " need both keys and values");
    if (!k.has_value()) return;
    if (k->dim() != 4)
      fail(std::string("attend: ") + what + " keys are " + shape_of(*k) +
           "; expected [batch, kv_heads, tokens, head_dim]");
    tokens = count < 0 ? room : count;
    expect(*k, {batch, layout.kv_heads, room, layout.key_dim}, type, what);
    expect(*v, {batch, layout.kv_heads, room, layout.value_dim}, type, what);
    keys = rows_tensor(*k);
    values = rows_tensor(*v);
  }
};

// The arguments that attend and attend_counting share, in the order of their schemas.
#define KVPACK_ATTEND_ARGUMENTS                                                                                      \
  const Tensor &query_in, const Tensor &table, const Tensor &counts, const std::optional<Tensor>&sink_keys,          \
      const std::optional<Tensor>&sink_values, const std::optional<Tensor>&keys, const std::optional<Tensor>&values, \
      const std::optional<Tensor>&rows, const std::optional<Tensor>&mask, const std::optional<Tensor>&sink_logits,   \
      std::vector<int64_t> layout_list, double scale, double softcap, bool causal, int64_t precision,                \
      double sparse_values, int64_t exact_tokens

Tensor attend_into(KVPACK_ATTEND_ARGUMENTS, std::optional<Tensor> out_in, std::atomic<int64_t>* unread) {
  const PageLayout layout = layout_from(layout_list);
  const PageTable pages = table_of(table);
  const ScalarType type = query_in.scalar_type();
  if (query_in.dim() != 4 || query_in.size(3) != layout.key_dim || query_in.size(0) != pages.batch)
    fail("attend: query is " + shape_of(query_in) + "; expected [" + std::to_string(pages.batch) +
         ", query_heads, tokens, " + std::to_string(layout.key_dim) + "]");
  if (precision != 0 && precision != 1)
    fail("attend: precision is " + std::to_string(precision) + "; allowed: 0 (default), 1 (high)");
  if (softcap < 0) fail("attend: softcap is negative; allowed: 0 (off) or positive");
  if (!(sparse_values >= 0 && sparse_values < 1))
    fail("attend: sparse_values is " + std::to_string(sparse_values) + "; allowed: 0 to below 1");
  const Tensor query = rows_tensor(query_in);
  AttendParams p{};
  p.dtype = dtype_of(type, "attend: query");
  const Exact sinks(sink_keys, sink_values, pages.batch, layout, type, "sinks");
  const Exact exact(keys, values, pages.batch, layout, type, "exact tokens", exact_tokens);
  p.batch = pages.batch;
  p.query_heads = query.size(1);
  p.query_tokens = query.size(2);
  p.kv_heads = layout.kv_heads;
  p.key_dim = layout.key_dim;
  p.value_dim = layout.value_dim;
  p.key_codec = layout.key_codec;
  p.value_codec = layout.value_codec;
  p.counts = typed<int32_t>(counts, ScalarType::Int, "counts");
  p.tiles = counts.numel();
  if (p.tiles > pages.stride * kPageTiles)
    fail("attend: " + std::to_string(p.tiles) + " tiles do not fit in " + std::to_string(pages.stride) +
         " pages a row");
  p.table = pages.addresses;
  p.table_stride = pages.stride;
  p.query = strided(query, p.dtype);
  p.sinks = sinks.tokens;
  p.exact = exact.tokens;
  if (sinks.keys) {
    p.sink_keys = strided(*sinks.keys, p.dtype);
    p.sink_values = strided(*sinks.values, p.dtype);
  }
  if (exact.keys) {
    p.keys = strided(*exact.keys, p.dtype);
    p.values = strided(*exact.values, p.dtype);
  }
  if (rows.has_value()) {
    expect(*rows, {p.batch, 2}, ScalarType::Int, "attend: rows");
    p.rows = typed<int32_t>(*rows, ScalarType::Int, "rows");
  }
  if (sink_logits.has_value()) {
    expect(*sink_logits, {p.query_heads}, ScalarType::Float, "attend: sink_logits");
    p.sink_logits = typed<float>(*sink_logits, ScalarType::Float, "sink_logits");
  }
  p.mask = mask_of(mask, p);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.causal = causal;
  p.precision = static_cast<Precision>(precision);
  p.sparse_values = static_cast<float>(sparse_values);
  p.threads = torch::stable::get_num_threads();
  p.unread = unread;
  if (out_in.has_value()) {
    expect(*out_in, {p.batch, p.query_heads, p.query_tokens, p.value_dim}, type, "attend: out");
    if (!out_in->is_contiguous()) fail("attend: out must be contiguous");
  }
  const int64_t shape[] = {p.batch, p.query_heads, p.query_tokens, p.value_dim};
  Tensor out = out_in.has_value() ? *out_in : torch::stable::new_empty(query, shape, type);
  p.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  if (out.numel() == 0) return out;
  Tensor workspace = torch::stable::new_empty(query, {static_cast<int64_t>(attend_workspace(p))}, ScalarType::Byte);
  attend(p, static_cast<uint8_t*>(workspace.mutable_data_ptr()), torch_for);
  return out;
}

Tensor attend_op(KVPACK_ATTEND_ARGUMENTS) {
  return attend_into(query_in, table, counts, sink_keys, sink_values, keys, values, rows, mask, sink_logits,
                     std::move(layout_list), scale, softcap, causal, precision, sparse_values, exact_tokens, {},
                     nullptr);
}

void attend_counting(KVPACK_ATTEND_ARGUMENTS, Tensor out, Tensor unread) {
  expect(unread, {2}, ScalarType::Long, "attend_counting: unread");
  if (!unread.is_contiguous()) fail("attend_counting: unread must be contiguous");
  static_assert(sizeof(std::atomic<int64_t>) == sizeof(int64_t) && std::atomic<int64_t>::is_always_lock_free);
  attend_into(query_in, table, counts, sink_keys, sink_values, keys, values, rows, mask, sink_logits,
              std::move(layout_list), scale, softcap, causal, precision, sparse_values, exact_tokens, out,
              static_cast<std::atomic<int64_t>*>(unread.mutable_data_ptr()));
}

}  // namespace

// Pins the ISA level of this library, which has its own copy of the core; called by kvpack.isa.use().
extern "C" __attribute__((visibility("default"))) int kvpack_isa_use(const char* name) {
  try {
    isa_use(name);
    return 0;
  } catch (const std::invalid_argument&) {
    return 1;
  }
}

STABLE_TORCH_LIBRARY_IMPL(kvpack, CPU, m) {
  m.impl("encode", TORCH_BOX(&encode));
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("encode_pages", TORCH_BOX(&encode_pages_op));
  m.impl("decode_pages", TORCH_BOX(&decode_pages_op));
  m.impl("append", TORCH_BOX(&append));
  m.impl("attend", TORCH_BOX(&attend_op));
  m.impl("attend_counting", TORCH_BOX(&attend_counting));
}
