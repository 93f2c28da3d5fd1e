// attend(): what a query may see. Pads, sinks inside the sequence, causality, masks in every broadcast form, soft caps,
// sink logits, rows with nothing to attend to, and NaN under a mask.
#include "attend_case.h"

namespace {

using namespace kvpack;
using namespace attend_case;

const Precision kPrecisions[] = {Precision::standard, Precision::high};

// (pad, sink_start) of a row, the way a cache makes it: sink_start = min(pad, max(0, first call - sinks)).
std::vector<int32_t> padded_rows(const Case& c, std::initializer_list<int32_t> pads, int32_t first_call) {
  std::vector<int32_t> rows;
  for (const int32_t pad : pads) {
    rows.push_back(pad);
    rows.push_back(std::min<int32_t>(pad, std::max<int32_t>(0, first_call - static_cast<int32_t>(c.sinks))));
  }
  return rows;
}

}  // namespace

TEST(pads_and_sink_start) {
  for (const auto& pads :
       {std::pair{0, 7}, std::pair{63, 64}, std::pair{65, 100}, std::pair{150, 199}, std::pair{200, 210}})
    for (const int64_t sinks : {0, 4})
      for (const Precision precision : kPrecisions) {
        Case c;
        c.counts = {64, 64, 40};
        c.sinks = sinks;
        c.precision = precision;
        c.query_tokens = 3;
        c.exact = 50;
        c.rows = padded_rows(c, {pads.first, pads.second}, 218);
        check_case(c);
      }
}

TEST(sinks_anywhere_in_the_stream) {
  // Before, inside and after tiles and exact tokens, with a mask that has a column per position.
  for (const int32_t start : {0, 1, 15, 16, 63, 64, 65, 127, 128, 129, 140, 150})
    for (const Mask::Kind kind : {Mask::Kind::none, Mask::Kind::boolean}) {
      Case c;
      c.counts = {64, 64};
      c.exact = 22;
      c.sinks = 5;
      c.rows = {start, start, std::max(0, start - 2), start};
      c.mask = kind;
      c.precision = Precision::high;
      check_case(c);
    }
}

TEST(causal_within_the_call) {
  for (const int64_t tokens : {1, 2, 5, 70})
    for (const int64_t before : {0, 1, 63, 64, 100})  // exact tokens of earlier calls
      for (const bool causal : {true, false}) {
        if (check::slow() && tokens == 70 && before != 63) continue;
        Case c;
        c.batch = 1;
        c.query_tokens = tokens;
        c.exact = before + tokens;
        c.causal = causal;
        c.counts = {64};
        c.precision = Precision::high;
        check_case(c);
      }
  // More queries than exact tokens: the first ones see packed tokens and sinks only.
  Case c;
  c.query_tokens = 5;
  c.exact = 2;
  c.precision = Precision::high;
  check_case(c);
}

TEST(masks_in_every_broadcast_form) {
  for (const Mask::Kind kind : {Mask::Kind::boolean, Mask::Kind::additive})
    for (int broadcast = 0; broadcast < 8; ++broadcast)
      for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16})
        for (const int step : {1, 3}) {
          if (kind == Mask::Kind::boolean && dtype != Dtype::f32) continue;
          if (check::slow() && (step != 1 || dtype != Dtype::f32) && broadcast != 2) continue;
          Case c;
          c.mask = kind;
          c.broadcast = broadcast;
          c.mask_dtype = dtype;
          c.mask_step = step;
          c.causal = false;
          c.query_tokens = 3;
          c.counts = {64, 30};
          c.precision = Precision::high;
          c.rows = {0, 0, 9, 9};
          check_case(c);
          c.precision = Precision::standard;
          c.causal = true;
          check_case(c);
        }
}

TEST(softcap_and_sink_logits) {
  for (const float softcap : {0.0F, 0.5F, 5.0F, 50.0F})
    for (const bool logits : {false, true})
      for (const Mask::Kind kind : {Mask::Kind::none, Mask::Kind::additive})
        for (const float gain : {1.0F, 4.0F})
          for (const Precision precision : kPrecisions) {
            if (check::slow() && logits != (gain == 4.0F)) continue;
            Case c;
            if (check::slow()) c.counts = {64, 64};
            c.softcap = softcap;
            c.sink_logits = logits;
            c.mask = kind;
            c.gain = gain;
            c.precision = precision;
            c.query_tokens = 3;
            check_case(c);
          }
}

TEST(nothing_to_attend_to_gives_zeros) {
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16})
    for (const bool logits : {false, true})
      for (const int tiles : {0, 2, 66}) {
        if (check::slow() && tiles == 66 && (dtype != Dtype::f16 || logits)) continue;
        Case c;
        c.dtype = dtype;
        c.sink_logits = logits;
        c.counts.assign(static_cast<size_t>(tiles), kTile);
        c.batch = 1;
        c.kv_heads = 1;
        c.query_heads = 2;
        const check::Context context(describe(c));
        const auto zeros = [&](const Bytes& out, int64_t from, int64_t to) {
          int64_t other = 0;
          for (int64_t i = from * c.value_dim; i < to * c.value_dim; ++i)
            other += reference::element(out.data() + i * dtype_bytes(dtype), dtype) != 0;
          return other == 0;
        };
        c.rows = {64 * tiles + 74, 0};  // all padding
        CHECK(zeros(Problem(c).run(), 0, 4));
        c.rows.clear();
        for (const Mask::Kind kind : {Mask::Kind::boolean, Mask::Kind::additive}) {
          c.mask = kind;
          Problem problem(c);
          // The second query of the first head sees nothing; the others see what they saw.
          const int64_t size = kind == Mask::Kind::boolean ? 1 : 4;
          const float hidden = -INFINITY;
          for (int64_t i = 0; i < problem.positions; ++i) {
            uint8_t* at = problem.mask.data() + (problem.positions + i) * size;
            kind == Mask::Kind::boolean ? static_cast<void>(*at = 0) : static_cast<void>(std::memcpy(at, &hidden, 4));
          }
          const Bytes out = problem.run();
          CHECK(zeros(out, 1, 2));
          const Error e = error_of(out, problem.expected(), dtype);
          CHECK_LE(e.worst_row, 3e-2 + 0x1p-8);
        }
      }
  // No tokens at all.
  Case c;
  c.counts.clear();
  c.sinks = c.exact = 0;
  const Bytes out = Problem(c).run();
  for (size_t i = 0; i < out.size(); ++i) CHECK_EQ(out.data()[i], uint8_t{0});
}

TEST(hidden_nan_does_not_leak) {
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16})
    for (const float poison : {std::nanf(""), INFINITY, -INFINITY})
      for (const float softcap : {0.0F, 10.0F}) {
        Case c;
        c.dtype = dtype;
        c.softcap = softcap;
        c.query_tokens = 3;
        c.exact = 140;
        c.mask = Mask::Kind::boolean;
        c.broadcast = 7;
        const check::Context context(describe(c), " poison ", poison);
        Problem clean(c), dirty(c);
        std::vector<float> bad(256, poison);
        // Exact tokens 5..24 and 100, and sink 2, hidden from every query; then padding does the same.
        const auto hide = [&](Problem& p, int64_t position) { p.mask.data()[position] = 0; };
        const auto spoil = [&](Array& a, int64_t token) {
          for (int64_t b = 0; b < a.batch; ++b)
            for (int64_t h = 0; h < a.heads; ++h)
              store_row(bad.data(), dtype, static_cast<int32_t>(a.dim), a.row(b, h, token));
        };
        for (int64_t e = 5; e < 101; e = e == 24 ? 100 : e + 1) {
          hide(clean, c.sinks + clean.packed + e);
          hide(dirty, c.sinks + clean.packed + e);
          spoil(dirty.keys, e);
          spoil(dirty.values, e);
        }
        hide(clean, 2);
        hide(dirty, 2);
        spoil(dirty.sink_keys, 2);
        spoil(dirty.sink_values, 2);
        CHECK(dirty.run() == clean.run());
      }
  // Keys that only some of the queries may see: the others do not notice.
  Case c;
  c.query_tokens = 5;
  c.batch = 1;
  Problem clean(c), dirty(c);
  std::vector<float> bad(64, std::nanf(""));
  for (int64_t h = 0; h < c.kv_heads; ++h) store_row(bad.data(), c.dtype, 64, dirty.keys.row(0, h, c.exact - 1));
  const Bytes want = clean.run(), got = dirty.run();
  for (int64_t r = 0; r < c.query_heads * c.query_tokens; ++r)
    if (r % c.query_tokens != c.query_tokens - 1)
      CHECK(std::memcmp(want.data() + r * c.value_dim * 4, got.data() + r * c.value_dim * 4,
                        static_cast<size_t>(c.value_dim) * 4) == 0);
}

TEST(nan_shows) {
  // A number of a query that is NaN, or of a key: the rows that meet it are NaN, whole, and no others change.
  for (const int32_t codec : {0, 1, 2, 5, 8, 12, 15, 17})
    for (const float softcap : {0.0F, 10.0F})
      for (const bool of_query : {true, false}) {
        Case c;
        c.key_codec = c.value_codec = inputs::code_of(codec);
        c.softcap = softcap;
        c.query_tokens = 5;
        c.batch = 1;
        const check::Context context(describe(c), of_query ? " query" : " key");
        Problem clean(c), dirty(c);
        std::vector<float> bad(static_cast<size_t>(c.key_dim), 0.5F);
        bad[3] = std::nanf("");
        const int64_t last = c.query_tokens - 1, group = c.query_heads / c.kv_heads;
        store_row(bad.data(), c.dtype, static_cast<int32_t>(c.key_dim),
                  of_query ? dirty.query.row(0, 0, last) : dirty.keys.row(0, 0, c.exact - 1));
        const Bytes want = clean.run(), got = dirty.run();
        for (int64_t r = 0; r < c.query_heads * c.query_tokens; ++r) {
          const bool meets = r % c.query_tokens == last && r / c.query_tokens < (of_query ? 1 : group);
          for (int64_t i = r * c.value_dim; i < (r + 1) * c.value_dim; ++i) {
            float a, b;
            std::memcpy(&a, want.data() + i * 4, 4);
            std::memcpy(&b, got.data() + i * 4, 4);
            CHECK(meets ? std::isnan(b) : a == b);
          }
        }
      }
}

TEST(masks_hide_whatever_lies_in_a_tile) {
  // Tokens that a crop removed, and tokens behind a mask, may be as large as the format allows: no trace of them.
  for (const Precision precision : kPrecisions) {
    Case c;
    c.batch = 1;
    c.counts = {64, 20};
    c.precision = precision;
    c.key_codec = c.value_codec = inputs::code_of(1);
    Problem clean(c), dirty(c);
    const RecordLayout record = clean.layout().record();
    for (int64_t head = 0; head < c.kv_heads; ++head) {
      uint8_t* at = dirty.pages[0].data() + static_cast<size_t>(head) * record.head_bytes() + record.bytes();
      auto* scales = reinterpret_cast<uint16_t*>(at);
      for (size_t i = 0; i < record.key_codes() / 2; ++i)
        if (i % kTile >= 20) scales[i] = 0x7bff;
    }
    const Error e = error_of(dirty.run(), clean.expected(), Dtype::f32);
    CHECK_LE(e.worst_row, precision == Precision::high ? 2e-4 : 3e-2);
  }
}
