// splitmix64 (Steele, Lea, Flood 2014): where the fixed random numbers of the format come from.
#pragma once
#include <cstdint>

namespace kvpack {

struct SplitMix64 {
  uint64_t state;
  constexpr uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15ULL;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }
};

}  // namespace kvpack
