// Our attend beside the prototype kernels: one core, d = 128, 8 KV heads of 4 query heads, cold caches (every call
// walks on through a large buffer), rounds interleaved in one process, thread CPU time.
//
//   prototype [tokens = 16384] [rounds = 15]
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <string>
#include <vector>

#include "kvpack/isa.h"
#include "kvpack/pages.h"

extern "C" {
void prototype_init();
void prototype_f16(const uint8_t*, int, const float*, float*);
void prototype_bf16(const uint8_t*, int, const float*, float*);
void prototype_q4(const uint8_t*, int, const float*, float*);
void prototype_q3(const uint8_t*, int, const float*, float*);
void prototype_q2(const uint8_t*, int, const float*, float*);
}

namespace {

constexpr int64_t kHeads = 8, kGroup = 4, kDim = 128;
constexpr size_t kBuffer = size_t{1} << 30;

double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

struct Contender {
  std::string name, baseline;
  size_t bytes;  // of one call
  std::function<void(uint8_t*)> run;
  std::vector<double> seconds{};
  size_t at = 0;
};

double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + static_cast<ptrdiff_t>(v.size() / 2), v.end());
  return v[v.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t tokens = argc > 1 ? std::atoll(argv[1]) : 16384, tiles = tokens / kvpack::kTile;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 15;
  prototype_init();
  auto* buffer = static_cast<uint8_t*>(std::aligned_alloc(size_t{2} << 20, kBuffer));
  uint64_t s = 88172645463325252ULL;
  for (size_t i = 0; i < kBuffer / 2; ++i) {  // fp16 between 1/2 and 1: valid scales and elements
    s ^= s << 13, s ^= s >> 7, s ^= s << 17;
    reinterpret_cast<uint16_t*>(buffer)[i] = static_cast<uint16_t>(0x3800U | (s & 0x07ffU));
  }
  std::vector<float> query(kHeads * kGroup * kDim), out(query.size());
  for (size_t i = 0; i < query.size(); ++i) query[i] = static_cast<float>(i * 37 % 101) / 500.0F - 0.1F;
  std::vector<Contender> all;
  const auto prototype = [&](const char* name, void (*run)(const uint8_t*, int, const float*, float*),
                             int64_t tile_bytes) {
    all.push_back({name, "", static_cast<size_t>(tile_bytes * tiles * kHeads), [=, &query, &out](uint8_t* at) {
                     for (int64_t h = 0; h < kHeads; ++h)
                       run(at + h * tiles * tile_bytes, static_cast<int>(tiles),
                           &query[static_cast<size_t>(h * kGroup * kDim)],
                           &out[static_cast<size_t>(h * kGroup * kDim)]);
                   }});
  };
  std::vector<int64_t> table(static_cast<size_t>((tiles + kvpack::kPageTiles - 1) / kvpack::kPageTiles));
  const std::vector<int32_t> counts(static_cast<size_t>(tiles), kvpack::kTile);
  std::vector<uint8_t> workspace;
  const auto ours = [&](const char* name, const char* baseline, int64_t codec) {
    const size_t page = kvpack::PageLayout{codec, kDim, codec, kDim, kHeads}.page_bytes();
    all.push_back({name, baseline, page * table.size(), [=, &query, &out, &table, &counts, &workspace](uint8_t* at) {
                     for (size_t i = 0; i < table.size(); ++i) table[i] = reinterpret_cast<int64_t>(at + i * page);
                     kvpack::AttendParams p{};
                     p.batch = p.query_tokens = 1;
                     p.query_heads = kHeads * kGroup, p.kv_heads = kHeads;
                     p.key_dim = p.value_dim = kDim;
                     p.tiles = static_cast<int64_t>(counts.size());
                     p.key_codec = p.value_codec = codec;
                     p.query = {reinterpret_cast<const uint8_t*>(query.data()), 0, kDim * 4, kDim * 4};
                     p.table = table.data(), p.table_stride = static_cast<int64_t>(table.size()),
                     p.counts = counts.data();
                     p.scale = 0.088388348F;
                     p.out = reinterpret_cast<uint8_t*>(out.data());
                     workspace.resize(kvpack::attend_workspace(p));
                     kvpack::attend(p, workspace.data(), kvpack::serial_for);
                   }});
  };
  constexpr int64_t kNorm = int64_t{1} << 8;
  prototype("prototype f16", prototype_f16, 2 * 64 * kDim * 2);
  prototype("prototype bf16", prototype_bf16, 2 * 64 * kDim * 2);
  prototype("prototype 4 bit", prototype_q4, 256 + 64 * kDim);
  prototype("prototype 3 bit", prototype_q3, 256 + 48 * kDim);
  prototype("prototype 2 bit", prototype_q2, 256 + 32 * kDim);
  ours("exact f16", "prototype f16", int64_t{1} << 16);
  ours("exact bf16", "prototype bf16", int64_t{2} << 16);
  ours("q8_0", "", 1);
  ours("q4_0", "", 2);
  ours("tq4", "prototype 4 bit", 5 | kNorm);
  ours("tq3", "prototype 3 bit", 4 | kNorm);
  ours("tq2", "prototype 2 bit", 3 | kNorm);
  for (int r = 0; r <= rounds; ++r)
    for (Contender& c : all) {
      const size_t slots = kBuffer / c.bytes;
      if (slots == 0) continue;
      uint8_t* at = buffer + (c.at++ % slots) * c.bytes / kvpack::kLine * kvpack::kLine;
      const double began = now();
      c.run(at);
      if (r > 0) c.seconds.push_back(now() - began);
    }
  std::printf("ISA %s, %lld tokens, one core\n%-16s %10s %8s %14s %12s\n", kvpack::isa_active().c_str(),
              static_cast<long long>(tokens), "", "ns/token", "GB/s", "x prototype", "x exact f16");
  const auto by_name = [&](const std::string& name) {
    return std::find_if(all.begin(), all.end(),
                        [&](const Contender& c) { return c.name == name && !c.seconds.empty(); });
  };
  for (const Contender& c : all) {
    if (c.seconds.empty()) continue;
    const double t = median(c.seconds);
    std::printf("%-16s %10.2f %8.1f", c.name.c_str(), t * 1e9 / static_cast<double>(tokens * kHeads),
                static_cast<double>(c.bytes) / t / 1e9);
    for (const std::string& baseline : {c.baseline, std::string("exact f16")}) {
      std::vector<double> ratio;
      if (const auto base = by_name(baseline); base != all.end())
        for (size_t i = 0; i < c.seconds.size(); ++i) ratio.push_back(base->seconds[i] / c.seconds[i]);
      ratio.empty() ? std::printf(" %13s", "") : std::printf(" %12.2fx", median(ratio));
    }
    std::printf("\n");
  }
  std::free(buffer);
}
