// Microseconds per sequence of the trellis search, on every ISA level of the machine, one thread:
//
//   cmake --preset release && cmake --build --preset release --target kvpack_core
//   g++ -O2 -std=c++20 -Icsrc benchmarks/viterbi.cpp build/release/libkvpack_core.a -o viterbi && ./viterbi
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "kernels/table.h"
#include "kvpack/isa.h"

int main() {
  using namespace kvpack;
  constexpr int32_t kLanes = 64;
  const char* names[kTrellisCodes] = {"tcq1", "tcq2", "tcq2.5", "tcq3", "tcq3.5", "tcq4"};
  const auto work = std::make_unique<TrellisWork>();
  std::printf("%-14s%8s", "us/sequence", "steps");
  for (const char* name : names) std::printf("%8s", name);
  for (const std::string& level : isa_available())
    for (const int32_t steps : {64, 128}) {
      isa_use(level);
      std::vector<int16_t> x(static_cast<size_t>(steps * kLanes));
      uint32_t state = 1;
      for (int16_t& v : x) {  // a sum of four uniform numbers
        int32_t sum = 0;
        for (int i = 0; i < 4; ++i) sum += static_cast<int32_t>((state = state * 1664525 + 1013904223) >> 19) - 4096;
        v = static_cast<int16_t>(sum);
      }
      std::vector<uint8_t> codes(x.size());
      std::printf("\n%-14s%8d", level.c_str(), steps);
      for (int32_t i = 0; i < kTrellisCodes; ++i) {
        double least = 1e9;
        for (int repeat = 0; repeat < (level == "scalar" ? 3 : 20); ++repeat) {
          const auto start = std::chrono::steady_clock::now();
          kernels().trellis_search[i](x.data(), steps, kLanes, codes.data(), work.get());
          const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
          least = std::min(least, time.count() / kLanes);
        }
        std::printf("%8.2f", least);
      }
    }
  std::printf("\n");
}
