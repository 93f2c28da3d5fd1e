// Floating-point control for the duration of a call, restored afterwards.
//
// Encoding needs IEEE behaviour (denormals kept), or codes would depend on what the host program has set. Attention
// wants denormals flushed: they cost up to six times the run time and carry nothing.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvpack {

class FpControl {
 public:
  enum class Mode { ieee, flush };
  explicit FpControl(Mode mode) : saved_(get()) {
#if defined(__x86_64__)
    constexpr uint64_t kFlush = 0x8040, kRounding = 0x6000;
#elif defined(__aarch64__)
    constexpr uint64_t kFlush = uint64_t{1} << 24, kRounding = uint64_t{3} << 22;
#else
    constexpr uint64_t kFlush = 0, kRounding = 0;
#endif
    set((saved_ & ~(kFlush | kRounding)) | (mode == Mode::flush ? kFlush : 0));
  }
  ~FpControl() { set(saved_); }
  FpControl(const FpControl&) = delete;
  FpControl& operator=(const FpControl&) = delete;

 private:
  static uint64_t get() {
#if defined(__x86_64__)
    return _mm_getcsr();
#elif defined(__aarch64__)
    uint64_t v;
    asm volatile("mrs %0, fpcr" : "=r"(v));
    return v;
#else
    return 0;
#endif
  }
  static void set(uint64_t v) {
#if defined(__x86_64__)
    _mm_setcsr(static_cast<uint32_t>(v));
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" ::"r"(v));
#else
    (void)v;
#endif
  }
  uint64_t saved_;
};

}  // namespace kvpack
