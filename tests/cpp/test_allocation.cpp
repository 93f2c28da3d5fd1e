// Kernels never allocate: encode_tile, decode_tile and attend ask operator new for nothing. One exception: the first
// encoding of a thread with a trellis codec.
#include <atomic>
#include <cstdlib>
#include <new>

#include "attend_case.h"
#include "kvpack/isa.h"

namespace {
std::atomic<int64_t> allocations{0};

void* counted(size_t size, size_t alignment) {
  ++allocations;
  void* p = nullptr;
  if (posix_memalign(&p, alignment < sizeof(void*) ? sizeof(void*) : alignment, size == 0 ? 1 : size) != 0)
    throw std::bad_alloc();
  return p;
}
// Not inlined: g++ would find that operator delete frees what operator new, which it does not inline, returned.
[[gnu::noinline]] void release(void* p) noexcept { std::free(p); }
}  // namespace

void* operator new(size_t n) { return counted(n, alignof(std::max_align_t)); }
void* operator new[](size_t n) { return counted(n, alignof(std::max_align_t)); }
void* operator new(size_t n, std::align_val_t a) { return counted(n, static_cast<size_t>(a)); }
void* operator new[](size_t n, std::align_val_t a) { return counted(n, static_cast<size_t>(a)); }
void operator delete(void* p) noexcept { release(p); }
void operator delete[](void* p) noexcept { release(p); }
void operator delete(void* p, size_t) noexcept { release(p); }
void operator delete[](void* p, size_t) noexcept { release(p); }
void operator delete(void* p, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, std::align_val_t) noexcept { release(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, size_t, std::align_val_t) noexcept { release(p); }

namespace {

using namespace kvpack;
using attend_case::Case;
using attend_case::Problem;
using inputs::Bytes;

template <class Body>
int64_t allocations_of(Body&& body) {
  const int64_t before = allocations;
  body();
  return allocations - before;
}

}  // namespace

TEST(the_counter_counts) {
  CHECK_EQ(allocations_of([] { const Bytes one(100); }), 1);
  CHECK_EQ(allocations_of([] { const std::vector<float> one(100, 1.0F); }), 1);
  CHECK_EQ(allocations_of([] {}), 0);
}

TEST(tiles_allocate_nothing) {
  (void)isa_active();  // detects the levels, once in the life of a process
  (void)inputs::encode(std::vector<float>(64 * 64, 1.0F), inputs::code_of(12), 64, Side::key);
  for (const int64_t code : inputs::codes_with_options(check::full()))
    for (const int32_t d : {64, 112, 256})
      for (const Side side : {Side::key, Side::value}) {
        if (check::slow() && inputs::info_of(code).trellis && d != 112) continue;
        const check::Context context(inputs::info_of(code).name, " head_dim ", d);
        std::vector<float> x(static_cast<size_t>(kTile * d), 0.5F);
        const Dtype dtype = inputs::input_dtype(code);
        const auto rows = inputs::elements(x, dtype);
        inputs::Tile tile(code, d, side);
        const ptrdiff_t stride = ptrdiff_t{d} * dtype_bytes(dtype);
        CHECK_EQ(allocations_of([&] { tile.freeze({rows.data(), dtype, stride}, 50, code); }), 0);
        CHECK_EQ(allocations_of([&] {
                   encode_tile({rows.data(), dtype, stride}, 50, code, d, side, tile.sections(), 0);
                 }),
                 0);
        CHECK_EQ(allocations_of([&] {
                   decode_tile(tile.read(), code, d, side, kTile, reinterpret_cast<uint8_t*>(x.data()), Dtype::f32,
                               ptrdiff_t{d} * 4);
                 }),
                 0);
        CHECK_EQ(allocations_of([&] { rotate_rows(x.data(), kTile, d, true); }), 0);
      }
}

TEST(a_thread_allocates_once_for_trellis_codecs) {
  std::thread([] {
    std::vector<float> x(64 * 64, 0.5F);
    inputs::Tile tiles[] = {{inputs::code_of(11), 64, Side::key}, {inputs::code_of(14), 64, Side::value}};
    const Vectors rows{reinterpret_cast<const uint8_t*>(x.data()), Dtype::f32, 256};
    const auto encode = [&](int n) {
      return allocations_of([&] {
        encode_tile(rows, kTile, inputs::code_of(n == 0 ? 11 : 14), 64, n == 0 ? Side::key : Side::value,
                    tiles[n].sections(), 0);
      });
    };
    CHECK_EQ(encode(0), 1);
    CHECK_EQ(encode(0), 0);
    CHECK_EQ(encode(1), 0);
  }).join();
}

TEST(attend_allocates_nothing) {
  for (const int tiles : {0, 3, 70})
    for (const auto& [key, value] : {std::pair{inputs::code_of(5, Rule::norm), inputs::code_of(4, Rule::norm)},
                                     std::pair{inputs::code_of(0), inputs::code_of(0)},
                                     std::pair{inputs::code_of(1), inputs::code_of(3, Rule::mse)},
                                     std::pair{inputs::code_of(13, Rule::norm, Dtype::f32, Center::tile),
                                               inputs::code_of(6, Rule::norm, Dtype::f32, Center::mean)}})
      for (const Precision precision : {Precision::standard, Precision::high})
        for (const int64_t tokens : {1, 40}) {
          if (check::slow() && tiles * tokens > 120) continue;
          if (check::slow() && tiles == 70 && key == value) continue;
          Case c;
          c.batch = 1;
          c.key_codec = key;
          c.value_codec = value;
          c.query_tokens = tokens;
          c.counts.assign(static_cast<size_t>(tiles), kTile);
          c.precision = precision;
          c.mask = Mask::Kind::additive;
          c.sink_logits = true;
          c.softcap = 30.0F;
          c.rows = {3, 3};
          const check::Context context(describe(c));
          const Problem problem(c);
          Bytes out(problem.run().size());
          const AttendParams p = problem.params(out.data());
          size_t size = 0;
          CHECK_EQ(allocations_of([&] { size = attend_workspace(p); }), 0);
          Bytes workspace(size);
          CHECK_EQ(allocations_of([&] { attend(p, workspace.data(), serial_for); }), 0);
        }
}

TEST(a_thousand_steps_allocate_nothing) {
  // Decoding: every step attends, every 64th packs a tile; pages are the caller's, and old ones stay as they are.
  constexpr int64_t kSteps = 1000, kFirst = 10, d = 64, heads = 2, tiles = kFirst + kSteps / kTile + 1;
  constexpr int64_t kPages = (tiles + kPageTiles - 1) / kPageTiles;
  for (const int id : {5, 1}) {
    if (check::slow() && id == 1) continue;
    const PageLayout layout{inputs::code_of(id, id == 5 ? Rule::norm : Rule::stored), d,
                            inputs::code_of(id, id == 5 ? Rule::norm : Rule::stored), d, heads};
    std::vector<Bytes> pages;
    std::vector<int64_t> addresses;
    for (int64_t i = 0; i < kPages; ++i) {
      pages.emplace_back(layout.page_bytes());
      addresses.push_back(reinterpret_cast<int64_t>(pages.back().data()));
    }
    const PageTable table{addresses.data(), 1, kPages};
    std::vector<float> tokens(static_cast<size_t>(heads * kFirst * kTile * d), 0.5F), query(4 * d, 0.1F), out(4 * d);
    const std::vector<int32_t> counts(static_cast<size_t>(tiles), static_cast<int32_t>(kTile));
    const auto rows = [&](int64_t n) {
      return Strided{reinterpret_cast<const uint8_t*>(tokens.data()), 0, n * d * 4, d * 4};
    };
    encode_pages(table, layout, rows(kFirst * kTile), rows(kFirst * kTile), Dtype::f32, 0, kFirst, serial_for);
    AttendParams p{};
    p.batch = p.query_tokens = 1;
    p.query_heads = 4;
    p.kv_heads = heads;
    p.key_dim = p.value_dim = d;
    p.key_codec = layout.key_codec;
    p.value_codec = layout.value_codec;
    p.query = {reinterpret_cast<const uint8_t*>(query.data()), 4 * d * 4, d * 4, d * 4};
    p.table = addresses.data();
    p.table_stride = kPages;
    p.counts = counts.data();
    p.scale = 0.125F;
    p.out = reinterpret_cast<uint8_t*>(out.data());
    p.tiles = tiles;
    Bytes workspace(attend_workspace(p));
    const int64_t stride = check::slow() ? 16 : 1;  // of the steps that run
    CHECK_EQ(allocations_of([&] {
               p.tiles = kFirst;
               for (int64_t step = 0; step < kSteps; step += stride) {
                 if (step % kTile == 0 && step > 0) {
                   encode_pages(table, layout, rows(kTile), rows(kTile), Dtype::f32, p.tiles, 1, serial_for);
                   ++p.tiles;
                 }
                 attend(p, workspace.data(), serial_for);
               }
             }),
             0);
    CHECK_EQ(p.tiles, kFirst + (kSteps - 1) / kTile);
  }
}

TEST(pages_allocate_nothing_per_tile) {
  // decode_pages holds one list of starts; nothing grows with rows or heads.
  const PageLayout layout{inputs::code_of(5, Rule::norm, Dtype::f32, Center::mean), 64,
                          inputs::code_of(4, Rule::norm, Dtype::f32, Center::tile), 64, 4};
  Bytes page(layout.page_bytes());
  const auto address = reinterpret_cast<int64_t>(page.data());
  std::vector<float> x(4 * 256 * 64, 1.0F);
  const Strided rows{reinterpret_cast<const uint8_t*>(x.data()), 0, 256 * 64 * 4, 256};
  const PageTable table{&address, 1, 1};
  const int32_t counts[] = {64, 64, 64, 64};
  CHECK_EQ(allocations_of([&] { encode_pages(table, layout, rows, rows, Dtype::f32, 0, 4, serial_for); }), 0);
  CHECK_LE(allocations_of([&] {
             decode_pages(table, layout, Side::value, counts, 4, Dtype::f32, reinterpret_cast<uint8_t*>(x.data()),
                          serial_for);
           }),
           1);
}
