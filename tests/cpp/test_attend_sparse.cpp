// Values that attend() leaves unread: of tiles that are masked, and of those whose probabilities are negligible.
#include "attend_case.h"

namespace {

using namespace kvpack;
using namespace attend_case;

struct Counts {
  std::atomic<int64_t> of[2] = {0, 0};
  int64_t met() const { return of[0]; }
  int64_t unread() const { return of[1]; }
};

double distance(const Bytes& a, const Bytes& b) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < a.size(); i += 4) {
    const double x = reference::element(a.data() + i, Dtype::f32), y = reference::element(b.data() + i, Dtype::f32);
    error += (x - y) * (x - y);
    norm += y * y;
  }
  return std::sqrt(error / norm);
}

// Groups of at most four query rows that meet every tile.
int64_t groups(const Case& c) {
  const int64_t rows = c.query_heads / c.kv_heads * c.query_tokens;
  int64_t n = 0;
  for (int64_t first = 0; first < rows; first += kRowBlock) n += (std::min(rows - first, kRowBlock) + 3) / 4;
  return c.batch * c.kv_heads * n;
}

Case sharp(int64_t tiles) {
  Case c;
  c.batch = 1;
  c.query_heads = 6;
  c.query_tokens = 1;
  c.counts.assign(static_cast<size_t>(tiles), kTile);
  c.precision = Precision::high;
  c.gain = 16.0F;
  return c;
}

}  // namespace

TEST(negligible_tiles_stay_unread) {
  for (const int64_t tiles : {3, 40, 70}) {
    if (check::slow() && tiles == 40) continue;
    for (const int value : {5, 0, 19, 13})
      for (const float share : {1e-4F, 1e-2F, 0.5F}) {
        if (check::others() || (check::slow() && value > 5)) continue;  // trellis codes take their time
        Case c = sharp(tiles);
        c.value_codec = inputs::default_code(codecs()[static_cast<size_t>(value)], Dtype::f32, Center::none);
        const Bytes all = Problem(c).run();
        c.sparse_values = share;
        const check::Context context(describe(c));
        Counts counts;
        const Bytes some = Problem(c).run(serial_for, counts.of);
        CHECK_EQ(counts.met(), tiles * groups(c));
        CHECK(tiles == 3 || counts.unread() > counts.met() / 20);
        CHECK(counts.unread() < counts.met());
        // The share bounds the probability that is missing; values here are about as large as the output.
        CHECK((distance(some, all) > 0) == (counts.unread() > 0));
        CHECK_LE(distance(some, all), static_cast<double>(share));
      }
  }
}

TEST(nothing_is_negligible_in_flat_attention) {
  Case c = sharp(70);
  c.gain = 0.3F;
  c.sparse_values = 1e-3F;
  Counts counts;
  const Bytes some = Problem(c).run(serial_for, counts.of);
  CHECK_EQ(counts.unread(), 0);
  c.sparse_values = 0.0F;
  CHECK(Problem(c).run() == some);
}

TEST(unread_values_do_not_depend_on_the_order_of_work) {
  for (const int64_t tiles : {5, 70}) {
    Case c = sharp(tiles);
    c.query_tokens = tiles == 5 ? 30 : 1;
    c.sparse_values = 1e-2F;
    c.sink_logits = true;
    const Problem problem(c);
    Counts serial, reversed, threads;
    const Bytes want = problem.run(serial_for, serial.of);
    CHECK(problem.run(reversed_for, reversed.of) == want);
    CHECK(problem.run(threads_for, threads.of) == want);
    CHECK_EQ(serial.met(), tiles * groups(c));
    CHECK(serial.unread() > 0);
    CHECK_EQ(reversed.unread(), serial.unread());
    CHECK_EQ(threads.unread(), serial.unread());
  }
}

TEST(values_of_masked_tiles_stay_unread) {
  // Positions 0..199 are padding: three tiles, whose values may be anything.
  for (const Precision precision : {Precision::standard, Precision::high}) {
    Case c;
    c.batch = 1;
    c.counts.assign(6, kTile);
    c.rows = {200, 200};
    c.precision = precision;
    c.value_codec = inputs::code_of(1);
    Problem problem(c);
    const reference::Matrix want = problem.expected();
    const RecordLayout record = problem.layout().record();
    for (int64_t t = 0; t < 3; ++t)
      for (int64_t head = 0; head < c.kv_heads; ++head)
        std::memset(reinterpret_cast<uint8_t*>(problem.table[0]) + static_cast<size_t>(head) * record.head_bytes() +
                        static_cast<size_t>(t) * record.bytes() + record.value_scales(),
                    0x7e, 128);
    Counts counts;
    const Error e = error_of(problem.run(serial_for, counts.of), want, c.dtype);
    CHECK_LE(e.worst_row, error_bound(precision));
    CHECK_EQ(counts.met(), 6 * groups(c));
    CHECK_EQ(counts.unread(), 3 * groups(c));
  }
}
