// attend() against double precision: codecs, groups, query tokens, head sizes, dtypes, crops; and what must not depend
// on who runs it: contents and bounds of the workspace, the host's floating-point control.
#include <cfenv>

#include "attend_case.h"
#include "core/fp_control.h"

namespace {

using namespace kvpack;
using namespace attend_case;

const Precision kPrecisions[] = {Precision::standard, Precision::high};

using inputs::default_code;

}  // namespace

TEST(all_codec_pairs) {
  struct Shape {
    int64_t query_tokens, key_dim, value_dim;
  };
  const std::vector<Shape> shapes =
      check::slow() ? std::vector<Shape>{{3, 64, 64}} : std::vector<Shape>{{1, 64, 64}, {3, 128, 64}, {5, 64, 128}};
  for (const CodecInfo& key : codecs())
    for (const CodecInfo& value : codecs())
      for (const Shape& s : shapes)
        for (const Precision precision : kPrecisions) {
          // A side does not know the other: every codec on either side of tq4, and with itself.
          if (!check::full() && key.id != value.id && key.name != "tq4" && value.name != "tq4") continue;
          Case c;
          c.key_codec = default_code(key);
          c.value_codec = default_code(value);
          c.query_tokens = s.query_tokens;
          c.key_dim = s.key_dim;
          c.value_dim = s.value_dim;
          c.precision = precision;
          c.counts = {64, 64, 41};
          c.batch = 1;
          check_case(c);
        }
}

TEST(scale_rules) {
  for (const Rule rule : {Rule::stored, Rule::norm, Rule::mse, Rule::unbiased})
    for (const CodecInfo& info : codecs()) {
      if (!info.scale_rules || (check::slow() && static_cast<int32_t>(rule) != info.id % 4)) continue;
      Case c;
      c.key_codec = inputs::code_of(info.id, rule);
      c.value_codec = inputs::code_of(info.id, rule);
      c.precision = Precision::high;
      check_case(c);
    }
}

TEST(centred_sides) {
  // Means are of the packed tokens, exact ones have none; five tiles: the second page has its copy of a row's mean.
  for (const CodecInfo& info : codecs())
    for (const Center key : {Center::none, Center::mean, Center::tile})
      for (const Center value : {Center::none, Center::mean, Center::tile})
        for (const Precision precision : kPrecisions) {
          if (!info.rotated || (key == Center::none && value == Center::none)) continue;
          if (!check::full() && key != value && info.name != "tq3" && info.name != "tcq2") continue;
          if (check::slow() && (precision == Precision::high) != (key == Center::tile)) continue;
          Case c;
          c.key_codec = default_code(info, Dtype::f32, key, info.name == "tq3");
          c.value_codec = default_code(info, Dtype::f32, value, info.name == "tcq1");
          c.counts = {64, 64, 30, 64, 64};
          c.precision = precision;
          c.common = 1.0F;
          c.softcap = info.id % 2 != 0 ? 10.0F : 0.0F;
          c.query_tokens = 3;
          if (check::slow()) c.batch = 1;
          check_case(c);
        }
  // Every head size, group and dtype; scores far above those of the exact tokens; a split history.
  for (const int64_t d : kHeadDims)
    for (const int64_t group : {1, 3}) {
      Case c;
      c.key_dim = c.value_dim = d;
      c.kv_heads = 1;
      c.query_heads = group;
      c.dtype = static_cast<Dtype>(d / 16 % 3);
      c.key_codec = default_code(codecs()[5], c.dtype, Center::tile);
      c.value_codec = default_code(codecs()[4], c.dtype, Center::mean);
      c.common = 2.0F;
      c.precision = Precision::high;
      c.mask = Mask::Kind::boolean;
      c.rows = {0, 0, 9, 9};
      check_case(c);
    }
  // A learned sink logit does not move with the keys, so that what the mean takes from the scores has to come back
  // whole.
  for (const CodecInfo& info : codecs())
    for (const Center center : {Center::mean, Center::tile}) {
      if (!info.rotated) continue;
      Case c;
      c.batch = 1;
      c.sinks = 0;
      c.exact = c.query_tokens = 1;
      c.sink_logits = true;
      c.common = 3.0F;
      c.key_codec = default_code(info, Dtype::f32, center);
      c.value_codec = default_code(info);
      c.precision = Precision::high;
      check_case(c);
    }
  Case c;
  c.batch = 1;
  c.counts.assign(66, kTile);
  c.key_codec = c.value_codec = default_code(codecs()[5], Dtype::f32, Center::mean);
  c.common = 1.0F;
  c.precision = Precision::high;
  check_case(c);
}

TEST(groups_and_query_tokens) {
  for (const int64_t group : {1, 2, 3, 4, 5, 7, 8, 16})
    for (const int64_t tokens : {1, 2, 5, 70}) {
      if (tokens == 70 && check::slow() && group != 1 && group != 3) continue;
      for (const Precision precision : kPrecisions)
        for (const auto& [key, value] : {std::pair{5, 4}, std::pair{2, 3}, std::pair{0, 0}}) {
          if (precision == Precision::high && key == 0) continue;  // says nothing about exact tiles
          if (check::slow() && key != 5 && tokens > 2) continue;
          Case c;
          c.batch = 1;
          c.kv_heads = 2;
          c.query_heads = 2 * group;
          c.query_tokens = tokens;
          c.key_codec = default_code(codecs()[static_cast<size_t>(key)]);
          c.value_codec = default_code(codecs()[static_cast<size_t>(value)]);
          c.counts = {64, 64};
          c.exact = tokens + 9;
          c.precision = precision;
          c.seed = static_cast<uint64_t>(100 * group + tokens);
          check_case(c);
        }
    }
}

TEST(head_sizes) {
  for (const int64_t dk : kHeadDims)
    for (const int64_t dv : kHeadDims)
      for (const auto& [key, value] :
           {std::pair{5, 4}, std::pair{1, 2}, std::pair{4, 1}, std::pair{0, 3}, std::pair{3, 0}, std::pair{2, 5},
            std::pair{8, 8}, std::pair{6, 9}, std::pair{13, 10}, std::pair{11, 13}})
        for (const Precision precision : kPrecisions) {
          // Of all pairs of sizes: every size with itself and with 64, and those of powers of two.
          const bool plain = (dk & (dk - 1)) == 0 && (dv & (dv - 1)) == 0;
          if (!check::full() && !plain && dk != dv && dk != 64 && dv != 64) continue;
          if (check::slow() && dk != dv && (dk != 80 || dv != 64)) continue;
          if (check::slow() && (precision == Precision::high) != (dk / 16 % 2 == 1)) continue;
          if (!check::full() && key > 5 && dk != dv && (dk != 80 || dv != 64)) continue;
          Case c;
          c.key_dim = dk;
          c.value_dim = dv;
          c.key_codec = default_code(codecs()[static_cast<size_t>(key)]);
          c.value_codec = default_code(codecs()[static_cast<size_t>(value)]);
          c.batch = 1;
          c.counts = {64, 64};
          c.exact = 20;
          c.precision = precision;
          check_case(c);
        }
}

TEST(head_sizes_and_groups) {
  // The vectors in flight depend on the rows of a group; head sizes need not be multiples of them.
  for (const int64_t d : kHeadDims)
    for (const int64_t group : {1, 2, 3, 4})
      for (const auto& [key, value] :
           {std::pair{4, 4}, std::pair{2, 2}, std::pair{0, 0}, std::pair{1, 3}, std::pair{6, 6}, std::pair{8, 8},
            std::pair{11, 11}, std::pair{12, 12}, std::pair{13, 13}, std::pair{14, 14}, std::pair{16, 16},
            std::pair{17, 17}, std::pair{18, 18}, std::pair{19, 19}})
        for (const Precision precision : kPrecisions) {
          if (check::slow() && (group + d / 16 + key) % 8 != (precision == Precision::high ? 0 : 4)) continue;
          Case c;
          c.batch = 1;
          c.kv_heads = 1;
          c.query_heads = group;
          c.query_tokens = 1;
          c.key_dim = d;
          c.value_dim = d;
          c.key_codec = default_code(codecs()[static_cast<size_t>(key)]);
          c.value_codec = default_code(codecs()[static_cast<size_t>(value)]);
          c.counts = {64, 30};
          c.exact = 5;
          c.precision = precision;
          check_case(c);
        }
}

TEST(codecs_of_two_parts) {
  for (const CodecInfo& info : codecs())
    for (const int64_t d : kHeadDims) {
      if (info.parts == 1) continue;
      Case c;
      c.key_dim = c.value_dim = d;
      c.batch = c.kv_heads = 1;
      c.key_codec = default_code(info, c.dtype, d % 64 == 0 ? Center::none : Center::tile);
      c.value_codec = default_code(info, c.dtype, Center::mean);
      c.precision = Precision::high;
      check_case(c);
    }
}

TEST(counts_after_a_crop) {
  // A crop lowers the count of the last tile then in the table; later tiles follow it.
  for (const std::vector<int32_t>& counts :
       {std::vector<int32_t>{1}, {63}, {64, 17}, {64, 17, 64, 3, 64, 64, 1}, {1, 1, 1, 1, 1}})
    for (const Precision precision : kPrecisions) {
      Case c;
      c.counts = counts;
      c.precision = precision;
      c.query_tokens = 5;
      check_case(c);
    }
}

TEST(parts_may_be_missing) {
  for (const int64_t tiles : {0, 2})
    for (const int64_t sinks : {0, 1, 4, 70})
      for (const int64_t exact : {0, 1, 64, 65, 130}) {
        if (tiles + sinks + exact == 0) continue;
        Case c;
        c.counts.assign(static_cast<size_t>(tiles), kTile);
        c.sinks = sinks;
        c.exact = exact;
        c.query_tokens = 1;
        c.precision = Precision::high;
        c.causal = exact > 0;
        check_case(c);
      }
}

TEST(element_dtypes_and_memory_order) {
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16})
    for (const bool token_major : {false, true})
      for (const auto& [key, value] :
           {std::pair{5, 4}, std::pair{1, 1}, std::pair{0, 0}, std::pair{0, 5}, std::pair{3, 0}})
        for (const Precision precision : kPrecisions) {
          if (check::slow() && token_major != (precision == Precision::high)) continue;
          Case c;
          c.key_codec = default_code(codecs()[static_cast<size_t>(key)], dtype);
          c.value_codec = default_code(codecs()[static_cast<size_t>(value)], dtype);
          c.dtype = dtype;
          c.token_major = token_major;
          c.precision = precision;
          c.query_tokens = 3;
          check_case(c);
        }
}

TEST(sharp_attention) {
  // Scores with a deviation of 4: a few tokens take everything, and errors of scores weigh more.
  for (const auto& [key, value] : {std::pair{5, 4}, std::pair{1, 2}, std::pair{0, 3}})
    for (const Precision precision : kPrecisions) {
      Case c;
      c.gain = 4.0F;
      c.key_codec = default_code(codecs()[static_cast<size_t>(key)]);
      c.value_codec = default_code(codecs()[static_cast<size_t>(value)]);
      c.precision = precision;
      check_case(c);
    }
}

TEST(workspace_and_output_bounds) {
  constexpr size_t kCanary = 256;
  for (const int64_t group : {1, 3, 16})
    for (const int64_t tokens : {1, 5, 70})
      for (const int tiles : {0, 2, 66}) {
        if (tiles == 66 && (tokens == 70 || (check::slow() && group * tokens > 3))) continue;
        if (check::slow() && group == 3 && tokens == 70) continue;
        Case c;
        c.batch = 1;
        c.kv_heads = 1;
        c.query_heads = group;
        c.query_tokens = tokens;
        c.key_dim = 128;
        c.counts.assign(static_cast<size_t>(tiles), kTile);
        const check::Context context(describe(c));
        const Problem problem(c);
        const Bytes want = problem.run();
        Bytes out(want.size() + 2 * kCanary);
        const AttendParams p = problem.params(out.data() + kCanary);
        const size_t size = attend_workspace(p);
        CHECK_EQ(size % 64, size_t{0});
        for (const int filling : {0x00, 0xa5}) {  // results do not depend on what lies in the workspace
          Bytes workspace(size + 2 * kCanary);
          std::memset(workspace.data(), filling, workspace.size());
          std::memset(out.data(), 0xa5, out.size());
          attend(p, workspace.data() + kCanary, serial_for);
          CHECK(std::memcmp(out.data() + kCanary, want.data(), want.size()) == 0);
          int64_t touched = 0;
          for (size_t i = 0; i < kCanary; ++i) {
            touched += workspace.data()[i] != filling;
            touched += workspace.data()[kCanary + size + i] != filling;
            touched += out.data()[i] != 0xa5;
            touched += out.data()[kCanary + want.size() + i] != 0xa5;
          }
          CHECK_EQ(touched, 0);
        }
      }
}

TEST(nothing_reads_pages_beyond_the_table) {
  // Only slots of tiles are read: the others hold NaN scales (the pages are filled with 0xff).
  for (const int tiles : {1, 2, 3, 5}) {
    Case c;
    c.counts.assign(static_cast<size_t>(tiles), kTile);
    c.precision = Precision::high;
    check_case(c);
  }
}

TEST(host_floating_point_control_does_not_matter) {
  for (const Precision precision : kPrecisions) {
    Case c;
    c.precision = precision;
    c.softcap = 20.0F;
    const Problem problem(c);
    const Bytes want = problem.run();
    {
      const FpControl flush(FpControl::Mode::flush);
      CHECK(problem.run() == want);
    }
    {
      const FpControl ieee(FpControl::Mode::ieee);
      CHECK(problem.run() == want);
    }
    std::fesetround(FE_UPWARD);
    const Bytes upward = problem.run();
    CHECK_EQ(std::fegetround(), FE_UPWARD);
    std::fesetround(FE_TONEAREST);
    CHECK(upward == want);
  }
}

TEST(full_matrix) {
  if (!check::full()) return;
  uint64_t seed = 1;
  for (const CodecInfo& key : codecs())
    for (const CodecInfo& value : codecs())
      for (const int64_t group : {1, 2, 3, 4, 5, 7, 8, 16})
        for (const int64_t tokens : {1, 2, 5, 70})
          for (const int64_t dk : kHeadDims)
            for (const int64_t dv : kHeadDims) {
              if (dv != dk && dv != 64 && dk != 128) continue;
              Case c;
              c.dtype = static_cast<Dtype>(seed % 3);
              c.key_codec = default_code(key, c.dtype);
              c.value_codec = default_code(value, c.dtype);
              c.batch = 1;
              c.kv_heads = 1 + static_cast<int64_t>(seed % 2);
              c.query_heads = group * c.kv_heads;
              c.query_tokens = tokens;
              c.key_dim = dk;
              c.value_dim = dv;
              c.counts = {64, 30};
              c.exact = tokens + 10;
              c.precision = kPrecisions[seed / 2 % 2];
              c.seed = seed++;
              check_case(c);
            }
}
