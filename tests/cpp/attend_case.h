// One call of attend() on random data, and the same attention in double precision.
//
// The reference decodes tiles in double precision (reference.h), puts every token at its position and takes a plain
// softmax over all of them: no tiles, no running maximum, no integers.
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <thread>

#include "check.h"
#include "kvpack/isa.h"
#include "kvpack/pages.h"
#include "reference.h"

namespace attend_case {

using namespace kvpack;
using inputs::Bytes;
using inputs::Random;

struct Case {
  int64_t query_heads = 4, kv_heads = 2, batch = 2, query_tokens = 2, key_dim = 64, value_dim = 64;
  int64_t key_codec = inputs::code_of(5, Rule::norm), value_codec = inputs::code_of(4, Rule::norm);
  std::vector<int32_t> counts{64, 64, 64};
  int64_t sinks = 4, exact = 70;
  std::vector<int32_t> rows;  // pad, sink_start of every batch row; empty: null
  Mask::Kind mask = Mask::Kind::none;
  int broadcast = 0;  // of the mask, bits: 1 batch, 2 head, 4 token
  int mask_step = 1;  // elements between columns
  Dtype mask_dtype = Dtype::f32;
  bool causal = true, sink_logits = false;
  float softcap = 0.0F, gain = 1.0F;  // gain: multiplies the queries, for sharper attention
  float common = 0.0F;                // what all packed vectors of a head have in common: the size of it per dim
  Precision precision = Precision::standard;
  float sparse_values = 0.0F;
  Dtype dtype = Dtype::f32;
  bool token_major = false;  // [batch, token, head, dim] in memory, as models make it; else [batch, head, token, dim]
  uint64_t seed = 1;
};

inline std::string describe(const Case& c) {
  std::ostringstream s;
  const auto center = [](int64_t code) { return static_cast<int>(CodecCode::unpack(code).center); };
  s << inputs::info_of(c.key_codec).name << '/' << inputs::info_of(c.value_codec).name << " centres "
    << center(c.key_codec) << ',' << center(c.value_codec) << " batch " << c.batch << " heads " << c.query_heads << ':'
    << c.kv_heads << " q " << c.query_tokens << " dims " << c.key_dim << ',' << c.value_dim << " tiles "
    << c.counts.size() << " sinks " << c.sinks << " exact " << c.exact << " mask " << static_cast<int>(c.mask)
    << " broadcast " << c.broadcast << " mask dtype " << static_cast<int>(c.mask_dtype) << " causal " << c.causal
    << " logits " << c.sink_logits << " softcap " << c.softcap << " gain " << c.gain << " precision "
    << static_cast<int>(c.precision) << " sparse " << c.sparse_values << " dtype " << static_cast<int>(c.dtype)
    << " token_major " << c.token_major;
  return s.str();
}

// [batch, heads, tokens, dim] of one dtype, in either memory order.
struct Array {
  int64_t batch, heads, tokens, dim;
  Dtype dtype;
  bool token_major;
  Bytes bytes;
  Array(int64_t b, int64_t h, int64_t t, int64_t d, Dtype type, bool major)
      : batch(b),
        heads(h),
        tokens(t),
        dim(d),
        dtype(type),
        token_major(major),
        bytes(static_cast<size_t>(b * h * t * d * dtype_bytes(type))) {}
  Strided strided() const {
    const ptrdiff_t row = dim * dtype_bytes(dtype);
    return token_major ? Strided{bytes.data(), tokens * heads * row, row, heads * row}
                       : Strided{bytes.data(), heads * tokens * row, tokens * row, row};
  }
  uint8_t* row(int64_t b, int64_t h, int64_t t) {
    const Strided s = strided();
    return bytes.data() + b * s.batch + h * s.head + t * s.token;
  }
  void fill(Random& random, float gain, float common = 0.0F) {
    float x[kMaxHeadDim], offset[kMaxHeadDim] = {};
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h) {
        if (common != 0.0F)
          for (float& v : offset) v = common * random.normal();
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t i = 0; i < dim; ++i) x[i] = offset[i] + gain * random.normal();
          store_row(x, dtype, static_cast<int32_t>(dim), row(b, h, t));
        }
      }
  }
  double at(int64_t b, int64_t h, int64_t t, int64_t i) {
    return reference::element(row(b, h, t) + i * dtype_bytes(dtype), dtype);
  }
};

class Problem {
 public:
  const Case c;
  int64_t packed, positions;
  Array query, keys, values, sink_keys, sink_values;
  Bytes mask;
  std::vector<float> logits;
  std::vector<int64_t> table;
  std::vector<Bytes> pages;

  explicit Problem(const Case& given)
      : c(given),
        packed(std::accumulate(c.counts.begin(), c.counts.end(), int64_t{0})),
        positions(packed + c.sinks + c.exact),
        query(c.batch, c.query_heads, c.query_tokens, c.key_dim, c.dtype, c.token_major),
        keys(c.batch, c.kv_heads, c.exact, c.key_dim, c.dtype, c.token_major),
        values(c.batch, c.kv_heads, c.exact, c.value_dim, c.dtype, c.token_major),
        sink_keys(c.batch, c.kv_heads, c.sinks, c.key_dim, c.dtype, c.token_major),
        sink_values(c.batch, c.kv_heads, c.sinks, c.value_dim, c.dtype, c.token_major),
        mask(c.mask == Mask::Kind::none ? 0 : static_cast<size_t>(mask_rows() * positions * mask_step())) {
    Random random(c.seed);
    query.fill(random, c.gain);
    for (Array* a : {&keys, &values, &sink_keys, &sink_values}) a->fill(random, 1.0F);
    for (int64_t h = 0; h < c.query_heads; ++h) logits.push_back(2.0F * random.normal());
    fill_mask(random);
    fill_pages(random);
  }

  PageLayout layout() const { return {c.key_codec, c.key_dim, c.value_codec, c.value_dim, c.kv_heads}; }

  // Packs these instead: 64 tokens of every tile.
  void encode(const Array& k, const Array& v) {
    encode_pages({table.data(), c.batch, static_cast<int64_t>(table.size()) / c.batch}, layout(), k.strided(),
                 v.strided(), c.dtype, 0, static_cast<int64_t>(c.counts.size()), serial_for);
  }

  AttendParams params(uint8_t* out) const {
    AttendParams p{};
    p.batch = c.batch;
    p.query_heads = c.query_heads;
    p.kv_heads = c.kv_heads;
    p.query_tokens = c.query_tokens;
    p.key_dim = c.key_dim;
    p.value_dim = c.value_dim;
    p.tiles = static_cast<int64_t>(c.counts.size());
    p.sinks = c.sinks;
    p.exact = c.exact;
    p.key_codec = c.key_codec;
    p.value_codec = c.value_codec;
    p.dtype = c.dtype;
    p.query = query.strided();
    p.sink_keys = sink_keys.strided();
    p.sink_values = sink_values.strided();
    p.keys = keys.strided();
    p.values = values.strided();
    p.table = table.data();
    p.table_stride = static_cast<int64_t>(table.size()) / c.batch;
    p.counts = c.counts.data();
    p.rows = c.rows.empty() ? nullptr : c.rows.data();
    if (c.mask != Mask::Kind::none) {
      const ptrdiff_t row = positions * mask_step(), token = (c.broadcast & 4) != 0 ? 0 : row;
      const ptrdiff_t head_rows = (c.broadcast & 4) != 0 ? 1 : c.query_tokens,
                      batch_rows = head_rows * ((c.broadcast & 2) != 0 ? 1 : c.query_heads);
      p.mask = {c.mask,
                mask.data(),
                c.mask_dtype,
                (c.broadcast & 1) != 0 ? 0 : batch_rows * row,
                (c.broadcast & 2) != 0 ? 0 : head_rows * row,
                token,
                mask_step()};
    }
    p.sink_logits = c.sink_logits ? logits.data() : nullptr;
    p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(c.key_dim)));
    p.softcap = c.softcap;
    p.causal = c.causal;
    p.precision = c.precision;
    p.sparse_values = c.sparse_values;
    p.out = out;
    return p;
  }

  // [batch, query_heads, query_tokens, value_dim] elements.
  Bytes run(ParallelFor parallel = serial_for, std::atomic<int64_t>* unread = nullptr) const {
    return run(c.precision, parallel, unread);
  }
  Bytes run(Precision precision, ParallelFor parallel = serial_for, std::atomic<int64_t>* unread = nullptr) const {
    Bytes out(static_cast<size_t>(c.batch * c.query_heads * c.query_tokens * c.value_dim * dtype_bytes(c.dtype)));
    AttendParams p = params(out.data());
    p.precision = precision;
    p.unread = unread;
    p.threads = parallel == serial_for ? 1 : 4;
    Bytes workspace(attend_workspace(p));
    attend(p, workspace.data(), parallel);
    return out;
  }

  // The same in double precision, one row per (batch, query head, query token).
  reference::Matrix expected() {
    reference::Matrix out = reference::Matrix::Zero(c.batch * c.query_heads * c.query_tokens, c.value_dim);
    const int64_t group = c.query_heads / c.kv_heads;
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t kv = 0; kv < c.kv_heads; ++kv) {
        const auto [all_keys, all_values, exact_index] = tokens(b, kv);
        reference::Matrix q(group * c.query_tokens, c.key_dim);
        for (int64_t r = 0; r < q.rows(); ++r)
          for (int64_t i = 0; i < c.key_dim; ++i)
            q(r, i) = query.at(b, kv * group + r / c.query_tokens, r % c.query_tokens, i);
        reference::Matrix scores = q * all_keys.transpose() / std::sqrt(static_cast<double>(c.key_dim));
        for (int64_t r = 0; r < q.rows(); ++r) {
          const int64_t head = kv * group + r / c.query_tokens, token = r % c.query_tokens;
          double top = c.sink_logits ? logits[static_cast<size_t>(head)] : -INFINITY;
          for (int64_t i = 0; i < positions; ++i) {
            double& s = scores(r, i);
            if (c.softcap > 0) s = c.softcap * std::tanh(s / c.softcap);
            s += bias(b, head, token, i);
            if (!c.rows.empty() && i < c.rows[static_cast<size_t>(2 * b)]) s = -INFINITY;
            const int64_t e = exact_index[static_cast<size_t>(i)];
            if (c.causal && e >= 0 && e >= c.exact - c.query_tokens + token + 1) s = -INFINITY;
            top = std::max(top, s);
          }
          if (top == -INFINITY) continue;  // nothing to attend to: zeros
          double total = c.sink_logits ? std::exp(logits[static_cast<size_t>(head)] - top) : 0;
          auto row = out.row((b * c.query_heads + head) * c.query_tokens + token);
          for (int64_t i = 0; i < positions; ++i) {
            const double p = std::exp(scores(r, i) - top);
            total += p;
            if (p != 0) row += p * all_values.row(i);
          }
          row /= total;
        }
      }
    return out;
  }

 private:
  int64_t mask_step() const { return c.mask_step * (c.mask == Mask::Kind::boolean ? 1 : dtype_bytes(c.mask_dtype)); }
  int64_t mask_rows() const {
    return ((c.broadcast & 1) != 0 ? 1 : c.batch) * ((c.broadcast & 2) != 0 ? 1 : c.query_heads) *
           ((c.broadcast & 4) != 0 ? 1 : c.query_tokens);
  }

  void fill_mask(Random& random) {
    if (c.mask == Mask::Kind::none) return;
    for (int64_t i = 0; i < mask_rows() * positions; ++i) {
      uint8_t* at = mask.data() + i * mask_step();
      const bool allowed = random.below(4) != 0;
      const float value = allowed ? random.normal() : -INFINITY;
      if (c.mask == Mask::Kind::boolean)
        *at = allowed ? 1 : 0;
      else
        store_row(&value, c.mask_dtype, 1, at);
    }
  }

  void fill_pages(Random& random) {
    const auto tiles = static_cast<int64_t>(c.counts.size()), per_row = (tiles + kPageTiles - 1) / kPageTiles;
    for (int64_t i = 0; i < c.batch * per_row; ++i) {
      pages.emplace_back(layout().page_bytes());
      table.push_back(reinterpret_cast<int64_t>(pages.back().data()));
    }
    if (tiles == 0) return;
    Array k(c.batch, c.kv_heads, tiles * kTile, c.key_dim, c.dtype, c.token_major);
    Array v(c.batch, c.kv_heads, tiles * kTile, c.value_dim, c.dtype, c.token_major);
    k.fill(random, 1.0F, c.common);
    v.fill(random, 1.0F, c.common);
    encode(k, v);
  }

  // What is added to a score: from the mask, by position.
  double bias(int64_t b, int64_t head, int64_t token, int64_t position) const {
    if (c.mask == Mask::Kind::none) return 0;
    const Mask m = params(nullptr).mask;
    const uint8_t* at = m.data + b * m.batch + head * m.head + token * m.token + position * m.key;
    if (c.mask == Mask::Kind::boolean) return *at != 0 ? 0 : -INFINITY;
    return reference::element(at, c.mask_dtype);
  }

  struct Tokens {
    reference::Matrix keys, values;
    std::vector<int64_t> exact_index;  // -1 where the position is not an exact token
  };
  // All tokens of one KV head, by position.
  Tokens tokens(int64_t b, int64_t kv) {
    Tokens all{
        {positions, c.key_dim}, {positions, c.value_dim}, std::vector<int64_t>(static_cast<size_t>(positions), -1)};
    const int64_t sink_start = c.rows.empty() ? 0 : c.rows[static_cast<size_t>(2 * b + 1)];
    const auto place = [&](int64_t stream) { return stream < sink_start ? stream : stream + c.sinks; };
    const RecordLayout record = layout().record();
    int64_t stream = 0;
    for (size_t t = 0; t < c.counts.size(); ++t) {
      const auto* page = reinterpret_cast<const uint8_t*>(
          table[static_cast<size_t>(b) * (table.size() / static_cast<size_t>(c.batch)) + t / kPageTiles]);
      const uint8_t* own = page + static_cast<size_t>(kv) * record.head_bytes();
      const uint8_t* at = own + t % kPageTiles * record.bytes();
      const auto slot = static_cast<int64_t>(t % kPageTiles);
      const auto section = [&](Side side, size_t codes, size_t scales) {
        return ConstTileSide{at + codes, reinterpret_cast<const uint16_t*>(at + scales),
                             reinterpret_cast<const int8_t*>(own + record.mean(side, slot)),
                             reinterpret_cast<const uint16_t*>(own + record.mean_scale(side, slot)),
                             own + record.map(side)};
      };
      const auto k = reference::decode(section(Side::key, record.key_codes(), record.key_scales()), c.key_codec,
                                       static_cast<int>(c.key_dim), Side::key);
      const auto v = reference::decode(section(Side::value, record.value_codes(), record.value_scales()), c.value_codec,
                                       static_cast<int>(c.value_dim), Side::value);
      for (int32_t i = 0; i < c.counts[t]; ++i, ++stream) {
        all.keys.row(place(stream)) = k.row(i);
        all.values.row(place(stream)) = v.row(i);
      }
    }
    const auto copy = [&](Array& k, Array& v, int64_t token, int64_t to) {
      for (int64_t i = 0; i < c.key_dim; ++i) all.keys(to, i) = k.at(b, kv, token, i);
      for (int64_t i = 0; i < c.value_dim; ++i) all.values(to, i) = v.at(b, kv, token, i);
    };
    for (int64_t e = 0; e < c.exact; ++e, ++stream) {
      copy(keys, values, e, place(stream));
      all.exact_index[static_cast<size_t>(place(stream))] = e;
    }
    for (int64_t j = 0; j < c.sinks; ++j) copy(sink_keys, sink_values, j, sink_start + j);
    return all;
  }
};

// Relative L2 errors of the rows; infinite where a row must be zero and is not, and where it is no number.
inline std::vector<double> row_errors(const Bytes& out, const reference::Matrix& want, Dtype dtype) {
  std::vector<double> errors;
  for (int64_t r = 0; r < want.rows(); ++r) {
    double error = 0;
    for (int64_t i = 0; i < want.cols(); ++i) {
      const double got = reference::element(out.data() + (r * want.cols() + i) * dtype_bytes(dtype), dtype);
      error += (got - want(r, i)) * (got - want(r, i));
    }
    const double norm = want.row(r).squaredNorm();
    const double row = norm > 0 ? std::sqrt(error / norm) : error == 0 ? 0 : INFINITY;
    errors.push_back(row >= 0 ? row : INFINITY);
  }
  return errors;
}

struct Error {
  double worst_row = 0, all = 0;  // relative L2
};

inline Error error_of(const Bytes& out, const reference::Matrix& want, Dtype dtype) {
  Error e;
  double sum = 0;
  const std::vector<double> rows = row_errors(out, want, dtype);
  for (int64_t r = 0; r < want.rows(); ++r) {
    const double row = rows[static_cast<size_t>(r)];
    e.worst_row = std::max(e.worst_row, row);
    sum += row == 0 ? 0 : row * row * want.row(r).squaredNorm();
  }
  e.all = want.squaredNorm() > 0 ? std::sqrt(sum / want.squaredNorm()) : e.worst_row;
  return e;
}

// What rounding in the integer kernels may cost, of relative error of a row: at most, and in the median of many.
constexpr double kMedianError = 1.5e-2;
constexpr double error_bound(Precision precision) { return precision == Precision::high ? 2e-4 : 3e-2; }

// Checks one case; `bound` 0: that of its precision. Rounding of the output to 16 bits comes on top.
inline Error check_case(const Case& c, double bound = 0) {
  if (check::others()) return {};
  const check::Context context(describe(c));
  Problem problem(c);
  const Error e = error_of(problem.run(), problem.expected(), c.dtype);
  const bool coded = inputs::info_of(c.key_codec).bits != 0 || inputs::info_of(c.value_codec).bits != 0;
  const double rounding = c.dtype == Dtype::f32 ? 0 : c.dtype == Dtype::f16 ? 0x1p-11 : 0x1p-8;
  // Errors of scores, hence of outputs, grow with the queries.
  if (bound == 0) bound = (coded ? error_bound(c.precision) : 5e-6) * std::max(1.0F, c.gain / 2);
  CHECK_LE(e.worst_row, bound + rounding);
  const std::string name = !coded ? "exact" : c.precision == Precision::high ? "precision 1" : "precision 0";
  const std::string sharp = c.gain > 1 ? ", sharp" : "";
  const std::string of = sharp + (c.dtype == Dtype::f32 ? "" : c.dtype == Dtype::f16 ? ", f16" : ", bf16");
  check::measure("attend, " + name + of + ", worst row", e.worst_row);
  check::measure("attend, " + name + of + ", worst call", e.all);
  return e;
}

// The orders in which a caller may run the items.
inline void reversed_for(int64_t n, void (*body)(void*, int64_t), void* context) {
  for (int64_t i = n - 1; i >= 0; --i) body(context, i);
}
inline void threads_for(int64_t n, void (*body)(void*, int64_t), void* context) {
  constexpr int64_t kThreads = 4;
  std::vector<std::thread> threads;
  for (int64_t k = 0; k < kThreads; ++k)
    threads.emplace_back([=] {
      for (int64_t i = k; i < n; i += kThreads) body(context, i);
    });
  for (std::thread& t : threads) t.join();
}

}  // namespace attend_case
