// What the integer kernels cost: attend() on packed tokens alone against double precision on what they decode to. What
// is measured is the rounding of queries and probabilities, whatever the codec did. tests/ops/test_accuracy.py asks the
// same of the operators, on measured channels too.
#include "attend_case.h"
#include "core/fp_control.h"
#include "kernels/table.h"
#include "simd/half.h"

namespace {

using namespace kvpack;
using namespace attend_case;

constexpr float kSigmas[] = {0.5F, 1.0F, 2.0F, 4.0F};  // deviations of the scores, in nats
const std::vector<std::string> kSpread{"sigma 0.5", "sigma 1", "sigma 2", "sigma 4"};
constexpr float kSpike = 6.4F;

// Query token t has scores of deviation kSigmas[t % 4].
void spread(Problem& problem) {
  const Case& c = problem.c;
  for (int64_t head = 0; head < c.query_heads; ++head)
    for (int64_t t = 0; t < c.query_tokens; ++t) {
      auto* q = reinterpret_cast<float*>(problem.query.row(0, head, t));
      for (int64_t i = 0; i < c.key_dim; ++i) q[i] *= kSigmas[static_cast<size_t>(t) % std::size(kSigmas)];
    }
}

// Packs tokens of which one in 64 stands out, by kSpike nats to the queries of its KV head; the small probabilities of
// the others add up to one direction.
void stand_out(Problem& problem) {
  const Case& c = problem.c;
  const int64_t d = c.key_dim, tokens = problem.packed, group = c.query_heads / c.kv_heads;
  Random random(7);
  Array keys(1, c.kv_heads, tokens, d, c.dtype, false), values(1, c.kv_heads, tokens, d, c.dtype, false);
  keys.fill(random, 1.0F);
  values.fill(random, 0.5F);
  for (int64_t kv = 0; kv < c.kv_heads; ++kv) {
    std::vector<float> q(static_cast<size_t>(d)), common[2] = {q, q};
    for (std::vector<float>* vector : {&q, &common[0], &common[1]})
      for (float& x : *vector) x = random.normal();
    const float size = std::inner_product(q.begin(), q.end(), q.begin(), 0.0F);
    for (int64_t t = 0; t < tokens; ++t) {
      const bool stands_out = t % kTile == 17;
      auto *key = reinterpret_cast<float*>(keys.row(0, kv, t)), *value = reinterpret_cast<float*>(values.row(0, kv, t));
      const float wanted = std::sqrt(static_cast<float>(d)) * (stands_out ? kSpike : 0.3F * random.normal());
      const float more = (wanted - std::inner_product(q.begin(), q.end(), key, 0.0F)) / size;
      for (size_t i = 0; i < q.size(); ++i) {
        key[i] += more * q[i];
        value[i] += common[stands_out ? 1 : 0][i];
      }
    }
    for (int64_t row = 0; row < group * c.query_tokens; ++row) {
      auto* own = reinterpret_cast<float*>(problem.query.row(0, kv * group + row % group, row / group));
      for (const float x : q) *own++ = x + 0.05F * random.normal();
    }
  }
  problem.encode(keys, values);
}

// Rows r with r % kinds == kind; the names of the kinds are for the log.
void check_rows(Problem& problem, const std::vector<std::string>& kinds) {
  const reference::Matrix want = problem.expected();
  for (const Precision precision : {Precision::standard, Precision::high}) {
    const std::vector<double> errors = row_errors(problem.run(precision), want, problem.c.dtype);
    for (size_t kind = 0; kind < kinds.size(); ++kind) {
      const check::Context context(kinds[kind], " precision ", static_cast<int>(precision));
      std::vector<double> of;
      for (size_t r = kind; r < errors.size(); r += kinds.size()) of.push_back(errors[r]);
      std::sort(of.begin(), of.end());
      const std::string name =
          "accuracy, precision " + std::to_string(static_cast<int>(precision)) + ", " + kinds[kind];
      check::measure(name + ", median", of[of.size() / 2]);
      check::measure(name + ", worst", of.back());
      if (precision == Precision::standard) CHECK_LE(of[of.size() / 2], kMedianError);
      CHECK_LE(of.back(), error_bound(precision));
    }
  }
}

}  // namespace

TEST(accuracy_of_every_codec) {
  // Errors are relative to outputs, and hardly depend on the number of tokens.
  const bool few = check::slow() || isa_active() == "scalar";
  for (const CodecInfo& info : codecs())
    for (const int64_t d : {128, 64}) {
      if (info.bits == 0 || (few && d != (info.id % 4 == 0 ? 128 : 64))) continue;
      Case c;
      c.batch = c.kv_heads = 1;
      c.sinks = c.exact = 0;
      c.causal = false;
      c.key_dim = c.value_dim = d;
      c.key_codec = c.value_codec = inputs::default_code(info);
      c.query_tokens = (few ? 4 : 8) * static_cast<int64_t>(std::size(kSigmas));
      c.counts.assign(few ? 5 : 12, kTile);
      const check::Context context(describe(c));
      Problem problem(c);
      spread(problem);
      check_rows(problem, kSpread);
      stand_out(problem);
      check_rows(problem, {"spikes"});
    }
}

TEST(largest_sums) {
  // Every token has the same probability, and vectors are nearly the same: all products have the largest sizes.
  for (const CodecInfo& info : codecs())
    for (const Precision precision : {Precision::standard, Precision::high}) {
      if (info.bits == 0) continue;
      Case c;
      c.batch = c.kv_heads = 1;
      c.sinks = c.exact = 0;
      c.causal = false;
      c.counts = {kTile};
      c.key_codec = c.value_codec = inputs::default_code(info);
      c.gain = 0.0F;
      c.common = 8.0F;
      c.precision = precision;
      check_case(c, precision == Precision::high ? 2e-5 : 2e-3);
    }
}

TEST(sums_at_their_bounds) {
  // Every code is the lowest, or the highest; queries and probabilities are as large as they are quantized to. Sums in
  // 16 bits that were allowed twice what fits would wrap.
  constexpr int32_t kGroup = 4;
  alignas(64) float query[kGroup * kMaxHeadDim], scores[kGroup * kTile], probs[kGroup * kTile],
      out[kGroup * kMaxHeadDim];
  static QueryRow rows[kGroup];
  const KernelTable& k = kernels();
  for (const CodecInfo& info : codecs()) {
    if (info.bits == 0 || info.elements || info.trellis || info.parts > 1) continue;
    const auto id = static_cast<size_t>(info.id);
    const int32_t codes = 1 << static_cast<int32_t>(info.bits);
    for (const int32_t d : {80, 112, 128, 256})
      for (const Side side : {Side::key, Side::value})
        for (const bool high : {false, true})
          for (const float sign : {1.0F, -1.0F}) {
            inputs::Tile tile(inputs::code_of(info.id), d, side);
            std::memset(tile.sections().codes, high ? 0xff : 0, tile.layout.code_bytes);
            // Asymmetric: steps of 1 and zeros that put the middle at 0.
            const float middle = static_cast<float>(codes - 1) / 2.0F;
            const size_t scales = tile.layout.scale_bytes / 2, steps = info.asymmetric ? scales / 2 : scales;
            const bool negative = sign < 0.0F && side == Side::value && (info.name == "q4_0" || info.name == "q5_0");
            for (size_t i = 0; i < scales; ++i)
              tile.sections().scales[i] = float_to_half(i >= steps ? -middle : negative ? -1.0F : 1.0F);
            const double level = info.asymmetric ? (high ? 1.0 : -1.0) * static_cast<double>(middle)
                                                 : reference::level(info, high ? codes - 1 : 0);
            for (const int32_t group : {1, kGroup})
              for (const int32_t levels : {1, 2}) {
                const check::Context context(std::string(info.name) + ", d = " + std::to_string(d));
                if (side == Side::key) {
                  std::fill(query, query + group * d, sign);
                  for (int32_t g = 0; g < group; ++g)
                    k.quantize_query({query + g * d, d, info.scale_block, levels, rows + g});
                  k.score[id][group - 1]({rows, query, tile.read(), tile.read().codes, scores, d, 0, levels});
                  const double want = static_cast<double>(sign) * level * d;
                  for (int32_t i = 0; i < group * kTile; ++i)
                    CHECK_LE(std::fabs(static_cast<double>(scores[i]) - want), 1e-3 * std::fabs(want));
                } else {
                  std::fill(probs, probs + group * kTile, 1.0F);
                  std::fill(out, out + group * d, 0.0F);
                  k.accumulate[id][group - 1]({probs, tile.read(), tile.read().codes, out, d, d, levels, 0});
                  const double want = (negative ? -1.0 : 1.0) * level * kTile;
                  for (int32_t i = 0; i < group * d; ++i)
                    CHECK_LE(std::fabs(static_cast<double>(out[i]) - want), 1e-2 * std::fabs(want));
                }
              }
          }
  }
}

TEST(every_element_of_e4m3_is_read) {
  // Kernels run with flush-to-zero: subnormals must count all the same. Scores and outputs are the elements themselves,
  // or with one level what they are in fixed point (kernels/e4m3.inl.h).
  const FpControl flush(FpControl::Mode::flush);
  constexpr int32_t d = 128;
  size_t fp8 = 0;
  while (codecs()[fp8].name != "fp8") ++fp8;
  inputs::Tile tile(inputs::code_of(codecs()[fp8].id), d, Side::key);
  for (int i = 0; i < kTile * d; ++i) tile.sections().codes[i] = static_cast<uint8_t>(i % 254 + i % 254 / 127);
  for (int t = 0; t < kTile; ++t) tile.sections().scales[t] = 0x3c00;
  const KernelTable& k = kernels();
  alignas(64) float query[d] = {}, scores[kTile], probs[kTile] = {}, out[d];
  QueryRow row;
  for (const int levels : {1, 2}) {
    const auto check_read = [&](float got, uint8_t code) {
      const float want = reference::e4m3(code);
      if (levels == 2)
        CHECK_EQ(got, want);
      else
        CHECK_LE(std::fabs(got - want), 0x1p-6F + 1e-5F * std::fabs(want));
    };
    for (int i = 0; i < d; ++i) {
      query[i] = 1.0F;
      k.quantize_query({query, d, kElementQueryBlock, levels, &row});
      k.score[fp8][0]({&row, query, tile.read(), tile.read().codes, scores, d, 0, levels});
      query[i] = 0.0F;
      for (int t = 0; t < kTile; ++t) check_read(scores[t], tile.read().codes[i * kTile + t]);
    }
    for (int t = 0; t < kTile; ++t) {
      probs[t] = 1.0F;
      std::memset(out, 0, sizeof out);
      k.accumulate[fp8][0]({probs, tile.read(), tile.read().codes, out, d, d, levels, 0});
      probs[t] = 0.0F;
      for (int i = 0; i < d; ++i) check_read(out[i], tile.read().codes[t * d + i]);
    }
  }
}
