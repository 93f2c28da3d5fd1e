// Work items of attend(): ranges of tiles, and that the order in which threads take them does not matter.
#include "attend_case.h"

namespace {

using namespace kvpack;
using namespace attend_case;
using inputs::default_code;

const Precision kPrecisions[] = {Precision::standard, Precision::high};

void check_orders(const Case& c) {
  const check::Context context(describe(c));
  const Problem problem(c);
  const Bytes serial = problem.run();
  CHECK(problem.run() == serial);
  CHECK(problem.run(reversed_for) == serial);
  CHECK(problem.run(threads_for) == serial);
}

}  // namespace

TEST(long_history_is_split_and_merged) {
  for (const int tiles : {64, 65, 131}) {
    if (tiles == 131 && check::slow()) continue;
    for (const Precision precision : kPrecisions) {
      Case c;
      c.batch = 1;
      c.kv_heads = 1;
      c.query_heads = 2;
      c.query_tokens = 1;
      c.counts.assign(static_cast<size_t>(tiles), kTile);
      c.precision = precision;
      c.sink_logits = tiles == 65;
      check_case(c);
    }
  }
}

TEST(more_ranges_than_a_tile_has_tokens) {
  // Ranges of 128 tiles, the longest that there are, and what comes before them: 66 parts to be merged.
  if (check::slow()) return;
  Case c;
  c.batch = c.kv_heads = 1;
  c.query_heads = c.query_tokens = 1;
  c.counts.assign(64 * 128 + 1, 1);
  check_case(c);
}

TEST(order_of_work_items_does_not_matter) {
  for (const int tiles : {3, 70})
    for (const Precision precision : kPrecisions) {
      Case c;
      c.batch = tiles == 3 ? 2 : 1;
      c.query_tokens = tiles == 3 ? 40 : 2;
      c.counts.assign(static_cast<size_t>(tiles), kTile);
      c.counts.back() = 20;
      c.precision = precision;
      c.sink_logits = true;
      check_orders(c);
    }
}

TEST(ranges_may_begin_within_a_page) {
  // 12 KV heads and 100 tiles: three ranges of 34, 34 and 32 tiles each.
  Case c;
  c.batch = 1;
  c.kv_heads = c.query_heads = 12;
  c.query_tokens = 1;
  c.counts.assign(100, kTile);
  c.key_codec = default_code(codecs()[5], Dtype::f32, Center::tile);
  c.value_codec = default_code(codecs()[4], Dtype::f32, Center::mean);
  check_case(c);
  check_orders(c);
}

TEST(rows_of_a_batch_have_ranges_of_their_own) {
  // Two rows of 3 KV heads and 40 tiles: two ranges of 20 tiles each; a mask, padding, and a mean of each row's values.
  Case c;
  c.kv_heads = 3;
  c.query_heads = 6;
  c.query_tokens = 1;
  c.counts.assign(40, kTile);
  c.counts.back() = 17;
  c.rows = {0, 3, 70, 70};
  c.mask = Mask::Kind::boolean;
  c.value_codec = default_code(codecs()[4], Dtype::f32, Center::mean);
  check_case(c);
  check_orders(c);
}

TEST(unread_values_are_counted_once) {
  Case c;
  c.kv_heads = 5;
  c.query_heads = 10;
  c.query_tokens = 1;
  c.counts.assign(40, kTile);
  c.gain = 4.0F;
  c.sparse_values = 0.5F;
  const Problem problem(c);
  std::atomic<int64_t> serial[2] = {0, 0}, reversed[2] = {0, 0}, threads[2] = {0, 0};
  const Bytes want = problem.run(serial_for, serial);
  CHECK(problem.run(reversed_for, reversed) == want);
  CHECK(problem.run(threads_for, threads) == want);
  CHECK_EQ(serial[0].load(), int64_t{2 * 5 * 40});
  CHECK(serial[1].load() > 0);
  for (int i = 0; i < 2; ++i) {
    CHECK_EQ(reversed[i].load(), serial[i].load());
    CHECK_EQ(threads[i].load(), serial[i].load());
  }
}
