// What the public API refuses, and in which words; values at the ends of the fp16 scale range; floating-point control.
#include <cfenv>

#include "attend_case.h"
#include "core/fp_control.h"
#include "kvpack/isa.h"

namespace {

using namespace kvpack;
using attend_case::Case;
using attend_case::Problem;
using inputs::Bytes;
constexpr Side kSides[] = {Side::key, Side::value};

const char* name_of(Side side) { return side == Side::key ? "key" : "value"; }

std::vector<float> normal_vectors(int32_t d) {
  inputs::Random random(static_cast<uint64_t>(d));
  std::vector<float> x(static_cast<size_t>(kTile * d));
  for (float& v : x) v = random.normal();
  return x;
}

// The register that rounds and flushes; exception flags are not control.
uint64_t control_bits() {
#if defined(__x86_64__)
  return __builtin_ia32_stmxcsr() & ~0x3fU;
#elif defined(__aarch64__)
  uint64_t v;
  asm volatile("mrs %0, fpcr" : "=r"(v));
  return v;
#else
  return 0;
#endif
}

// Runs body under every control a host may have set; the control must survive.
template <class Body>
void under_host_controls(Body&& body) {
  for (const FpControl::Mode mode : {FpControl::Mode::ieee, FpControl::Mode::flush})
    for (const int rounding : {FE_TONEAREST, FE_UPWARD, FE_TOWARDZERO}) {
      const check::Context context("flush ", mode == FpControl::Mode::flush, " rounding ", rounding);
      const FpControl control(mode);
      std::fesetround(rounding);
      const uint64_t before = control_bits();
      body();
      const uint64_t after = control_bits();
      std::fesetround(FE_TONEAREST);
      CHECK_EQ(after, before);
    }
}

}  // namespace

TEST(codec_codes_and_head_sizes) {
  const auto count = static_cast<int64_t>(codecs().size());
  for (const int64_t code : {count, int64_t{255}, int64_t{-1}, int64_t{5} | 4 << 8, int64_t{0} | 3 << 16,
                             int64_t{5} | int64_t{3} << 24, int64_t{5} | int64_t{1} << 29, int64_t{1} << 40})
    CHECK_THROWS(layout_of(code, 128, Side::key), "codec code " + std::to_string(code),
                 "0.." + std::to_string(count - 1), "rule (0..3)", "dtype (0..2)", "center (0..2)");
  // Options that a codec does not have.
  for (const CodecInfo& info : codecs()) {
    const auto refused = [&](int64_t option, const char* what) {
      CHECK_THROWS(layout_of(info.id | option, 128, Side::key), std::string(info.name) + " has no ", what);
    };
    if (!info.scale_rules) refused(1 << 8, "scale rule");
    if (!info.scale_rules) refused(1 << 28, "search");
    if (!info.rotated) refused(1 << 24, "centring");
    if (!info.rotated) refused(2 << 24, "centring");
    if (info.bits != 0) refused(1 << 16, "element dtype");
  }
  for (const int64_t d : {-64, 0, 1, 32, 48, 63, 65, 88, 144, 224, 320, 512})
    for (const int64_t code : inputs::codec_codes())
      CHECK_THROWS(layout_of(code, d, Side::value), "head_dim " + std::to_string(d) + " ",
                   "64, 80, 96, 112, 128, 160, 192, 256", "2^a times 1, 12, 20 or 28");
  float x[64] = {};
  CHECK_THROWS(rotate_rows(x, 1, 63, false), "head_dim 63", "64, 80");
  CHECK_THROWS(rotation_signs(512), "head_dim 512", "192, 256");
  CHECK_THROWS((PageLayout{99, 64, 0, 64, 1}).record(), "codec code 99");
  CHECK_THROWS((PageLayout{5, 64, 4, 72, 1}).record(), "head_dim 72");
  CHECK_THROWS((PageLayout{5, 64, 4, 64, 0}).page_bytes(), "kv_heads is 0", "1 or more");
}

TEST(nan_and_infinity_name_the_token) {
  for (const int64_t code : inputs::codes_with_options(false))
    for (const int32_t d : kHeadDims)
      for (const Side side : kSides)
        for (const float bad : {std::nanf(""), INFINITY, -INFINITY})
          for (const int token : {0, 17, 63})
            for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
              const bool exact = inputs::info_of(code).bits == 0;
              if (exact && dtype != inputs::input_dtype(code)) continue;
              if (check::slow() && !(d == 64 && side == Side::key)) continue;
              const check::Context context(inputs::info_of(code).name, " head_dim ", d, " dtype ",
                                           static_cast<int>(dtype), " value ", bad);
              auto x = normal_vectors(d);
              x[static_cast<size_t>(token * d + d - 1 - token)] = bad;
              x.back() = bad;  // the first one is named
              const auto rows = inputs::elements(x, dtype);
              const Vectors vectors{rows.data(), dtype, ptrdiff_t{d} * dtype_bytes(dtype)};
              inputs::Tile tile(code, d, side);
              if (tile.layout.center != Center::none) {
                *tile.sections().mean_scale = 0;
                if (tile.layout.center == Center::mean)
                  CHECK_THROWS(tile.freeze(vectors, kTile, code, 100), "NaN or Inf", name_of(side),
                               "token " + std::to_string(100 + token) + " ");
              }
              CHECK_THROWS(encode_tile(vectors, kTile, code, d, side, tile.sections(), 100), "NaN or Inf",
                           name_of(side), "token " + std::to_string(100 + token) + " ");
            }
}

TEST(scales_beyond_fp16) {
  for (const int64_t code : inputs::codec_codes()) {
    const CodecInfo& info = inputs::info_of(code);
    if (info.bits == 0) continue;
    for (const int32_t d : kHeadDims)
      for (const Side side : kSides) {
        if (inputs::skip(code, d)) continue;
        const check::Context context(info.name, " code ", code, " head_dim ", d);
        auto x = normal_vectors(d);
        for (int i = 0; i < d; ++i) x[static_cast<size_t>(20 * d + i)] = i % 2 != 0 ? 1e30F : -1e30F;
        const auto encode = [&](const std::vector<float>& v) {
          inputs::Tile tile(code, d, side);
          encode_tile({reinterpret_cast<const uint8_t*>(v.data()), Dtype::f32, ptrdiff_t{d} * 4}, kTile, code, d, side,
                      tile.sections(), 1000);
          return tile;
        };
        CHECK_THROWS(encode(x), "fp16 scale", name_of(side), "token 1020 ", std::string(info.name));
        // The other end: nothing of 1e-30 is left, and it is no error. Neither are the largest scales that fit.
        for (int i = 0; i < d; ++i) x[static_cast<size_t>(20 * d + i)] = i % 2 != 0 ? 1e-30F : -1e-30F;
        const auto tile = encode(x);
        std::vector<float> decoded(x.size());
        decode_tile(tile.read(), code, d, side, kTile, reinterpret_cast<uint8_t*>(decoded.data()), Dtype::f32,
                    ptrdiff_t{d} * 4);
        // Keys per channel keep their range whatever one token is.
        for (int i = 0; i < d && !(info.asymmetric && side == Side::key); ++i)
          CHECK_EQ(decoded[static_cast<size_t>(20 * d + i)], 0.0F);
        for (int i = 0; i < d; ++i) CHECK_NE(decoded[static_cast<size_t>(21 * d + i)], INFINITY);
        for (int i = 0; i < d; ++i) x[static_cast<size_t>(20 * d + i)] = i % 2 != 0 ? 6e4F : -6e4F;
        const auto large = encode(x);
        for (size_t i = 0; i < large.layout.scale_bytes / 2; ++i) CHECK_LT(large.read().scales[i] & 0x7fff, 0x7c00);
      }
  }
  // FLT_MAX and the smallest denormal: the exponent is taken out before anything is squared.
  for (const float extreme : {3.4028235e38F, 1e-45F}) {
    std::vector<float> x(64 * 64, extreme);
    const int64_t code = inputs::code_of(5, Rule::norm);
    if (extreme > 1)
      CHECK_THROWS(inputs::encode(x, code, 64, Side::key), "fp16 scale", "token 0 ");
    else
      CHECK_EQ(inputs::encode(x, code, 64, Side::key).read().scales[0], uint16_t{0});
  }
}

TEST(exact_keeps_its_dtype) {
  const auto x = normal_vectors(64);
  inputs::Tile tile(inputs::code_of(0, Rule::stored, Dtype::f16), 64, Side::key);
  CHECK_THROWS(encode_tile({reinterpret_cast<const uint8_t*>(x.data()), Dtype::f32, 256}, kTile,
                           inputs::code_of(0, Rule::stored, Dtype::f16), 64, Side::key, tile.sections(), 0),
               "exact", "dtype");
}

TEST(page_tables) {
  const PageLayout layout{inputs::code_of(5, Rule::norm), 64, inputs::code_of(1), 64, 2};
  Bytes pages[2] = {Bytes(layout.page_bytes()), Bytes(layout.page_bytes())};
  const auto x = normal_vectors(64);
  std::vector<float> rows(2 * 5 * 64 * 64);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = x[i % x.size()];
  const Strided strided{reinterpret_cast<const uint8_t*>(rows.data()), 0, 5 * 64 * 256, 256};
  const int32_t counts[] = {64, 64, 64, 64, 64};
  std::vector<float> out(2 * 5 * 64 * 64);
  const auto encode = [&](const std::vector<int64_t>& table, int64_t first, int64_t tiles) {
    encode_pages({table.data(), 1, static_cast<int64_t>(table.size())}, layout, strided, strided, Dtype::f32, first,
                 tiles, serial_for);
  };
  const auto decode = [&](const std::vector<int64_t>& table, const int32_t* count, int64_t tiles) {
    decode_pages({table.data(), 1, static_cast<int64_t>(table.size())}, layout, Side::key, count, tiles, Dtype::f32,
                 reinterpret_cast<uint8_t*>(out.data()), serial_for);
  };
  const auto a = reinterpret_cast<int64_t>(pages[0].data()), b = reinterpret_cast<int64_t>(pages[1].data());
  encode({a, b}, 0, 5);
  decode({a, b}, counts, 5);
  CHECK_THROWS(encode({a, 0}, 0, 5), "page 1 of row 0", "64-byte aligned");
  CHECK_THROWS(encode({a + 32, b}, 0, 5), "page 0 of row 0", "64-byte aligned");
  CHECK_THROWS(encode({a, b}, 4, 5), "2 pages a row", "tile 8");
  CHECK_THROWS(decode({a, 0}, counts, 5), "page 1 of row 0", "64-byte aligned");
  CHECK_THROWS(decode({a, b + 1}, counts, 5), "page 1 of row 0", "64-byte aligned");
  CHECK_THROWS(decode({a, b}, counts, 9), "2 pages a row", "tile 8");
  for (const int32_t bad : {0, -1, 65}) {
    const int32_t wrong[] = {64, bad};
    CHECK_THROWS(decode({a, b}, wrong, 2), "tile 1 counts " + std::to_string(bad), "1..64");
  }
  // An error of one item reaches the caller, from other threads too, and names the token of the call.
  rows[static_cast<size_t>((64 * 2 + 7) * 64)] = INFINITY;
  CHECK_THROWS(encode({a, b}, 0, 5), "NaN or Inf", "key", "token 135 ");
  CHECK_THROWS(encode_pages(PageTable{&a, 1, 1}, layout, strided, strided, Dtype::f32, 0, 4, attend_case::threads_for),
               "NaN or Inf", "token 135 ");
}

TEST(attend_refuses) {
  Case c;
  c.batch = 2;
  c.counts = {64, 64, 64, 64, 64};
  const auto attempt = [](const Problem& problem, auto&& change) {
    Bytes out(problem.run().size());
    AttendParams p = problem.params(out.data());
    Bytes workspace(attend_workspace(p));
    change(p);
    attend(p, workspace.data(), serial_for);
  };
  const Problem good(c);
  attempt(good, [](AttendParams&) {});
  CHECK_THROWS(attempt(good, [](AttendParams& p) { p.query_heads = 5; }), "5 query heads", "multiple of 2");
  CHECK_THROWS(attempt(good, [](AttendParams& p) { p.kv_heads = 3; }), "4 query heads", "multiple of 3");
  CHECK_THROWS(attempt(good, [](AttendParams& p) { p.kv_heads = 0; }), "4 query heads", "multiple of 0");
  CHECK_THROWS(attempt(good, [](AttendParams& p) { p.key_codec = 77; }), "codec code 77");
  CHECK_THROWS(attempt(good, [](AttendParams& p) { p.value_codec = -3; }), "codec code -3");
  CHECK_THROWS(attempt(good, [](AttendParams& p) { p.key_dim = 88; }), "head_dim 88", "64, 80");
  CHECK_THROWS(attempt(good, [](AttendParams& p) { p.value_dim = 512; }), "head_dim 512");
  AttendParams heads = good.params(nullptr);
  heads.query_heads = 5;
  CHECK_THROWS(attend_workspace(heads), "5 query heads");
  for (const int32_t bad : {0, -1, 65}) {
    const std::vector<int32_t> counts{64, 64, 64, bad, 64};
    CHECK_THROWS(attempt(good, [&](AttendParams& p) { p.counts = counts.data(); }),
                 "tile 3 counts " + std::to_string(bad), "1..64");
  }
  for (const int64_t page : {int64_t{0}, good.table[3] + 16}) {
    std::vector<int64_t> table = good.table;
    table[3] = page;
    CHECK_THROWS(attempt(good, [&](AttendParams& p) { p.table = table.data(); }), "page 1 of row 1", "64-byte aligned");
  }
}

TEST(isa_levels) {
  const auto levels = isa_available();
  CHECK(!levels.empty() && levels[0] == "scalar");
  const std::string before = isa_active();
  for (const std::string& level : levels) {
    isa_use(level);
    CHECK_EQ(isa_active(), level);
  }
  isa_use(before);
  CHECK_THROWS(isa_use("sse9"), "'sse9'", "available: scalar");
  CHECK_THROWS(isa_use(""), "''", "available: scalar");
  CHECK_EQ(isa_active(), before);
}

TEST(registry) {
  CHECK_GE(codecs().size(), size_t{15});
  for (size_t i = 0; i < codecs().size(); ++i) {
    const CodecInfo& c = codecs()[i];
    CHECK_EQ(static_cast<size_t>(c.id), i);
    CHECK(!c.name.empty() && !c.what.empty() && !c.source.empty());
    CHECK(c.bits == 8 || (c.bits >= 0 && c.bits <= 5));
    CHECK(!c.elements || c.bits == 8);
    CHECK(!c.trellis || (c.rotated && c.scale_rules && c.scale_block == 0));
  }
}

// Run on request only, with KVPACK_ISA set to a level that does not exist.
TEST(unknown_level) {
  CHECK_THROWS(isa_active(), std::string("'") + std::getenv("KVPACK_ISA") + "'", "available: scalar");
  CHECK_THROWS(inputs::encode(normal_vectors(64), inputs::code_of(1), 64, Side::key), "available: scalar");
}

TEST(host_control_does_not_change_codes) {
  for (const int64_t code : inputs::codes_with_options(check::full()))
    for (const int32_t d : kHeadDims) {
      if (inputs::skip(code, d) || (!check::full() && inputs::info_of(code).trellis && d != 80)) continue;
      const check::Context context(inputs::info_of(code).name, " code ", code, " head_dim ", d);
      const auto x = [&] {
        auto all = inputs::golden(d);  // with denormals and scales that underflow
        all.resize(static_cast<size_t>(kTile * d));
        return all;
      }();
      const auto want = inputs::encode(x, code, d, Side::value);
      const auto decode = [&](std::vector<float>& out) {
        decode_tile(want.read(), code, d, Side::value, kTile, reinterpret_cast<uint8_t*>(out.data()), Dtype::f32,
                    ptrdiff_t{d} * 4);
      };
      std::vector<float> values(x.size()), again(x.size());
      decode(values);
      under_host_controls([&] {
        CHECK(inputs::encode(x, code, d, Side::value) == want);
        decode(again);
        CHECK(std::memcmp(values.data(), again.data(), values.size() * 4) == 0);
      });
    }
}

TEST(control_register_is_restored) {
  Case c;
  c.counts.assign(70, kTile);  // also the pass that prepares queries of a split call
  c.batch = 1;
  const Problem problem(c);
  Problem short_one(Case{});
  under_host_controls([&] {
    CHECK(problem.run().size() != 0);
    CHECK(short_one.run().size() != 0);
    // Threads of the caller's pool get their control back after every item, not only after the call.
    (void)problem.run([](int64_t n, void (*body)(void*, int64_t), void* p) {
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t before = control_bits();
        body(p, i);
        CHECK_EQ(control_bits(), before);
      }
    });
    auto x = normal_vectors(64);
    rotate_rows(x.data(), 64, 64, true);
    // An exception restores it, too.
    x[77] = INFINITY;
    CHECK_THROWS(inputs::encode(x, inputs::code_of(3, Rule::mse), 64, Side::key), "token 1 ");
  });
}
