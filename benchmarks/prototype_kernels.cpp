// The throwaway kernels that set our targets, behind C names. Compiled from a folder outside this repository
// (PROTOTYPES in the Makefile); AVX-512 only. The headers also hold kernels for native fp16 arithmetic, which are
// compiled but not called.
#include "attn5.h"

extern "C" {
void prototype_init() {
  init_codebooks();
  PFD = 4096;  // bytes of prefetch distance: the best of its own sweep
}
void prototype_f16(const uint8_t* tiles, int n, const float* q, float* out) { attn_bl<1, 4>(tiles, n, q, out); }
void prototype_bf16(const uint8_t* tiles, int n, const float* q, float* out) { attn_bl<2, 4>(tiles, n, q, out); }
void prototype_q4(const uint8_t* tiles, int n, const float* q, float* out) { attn_v3<F4, 4, 1, 0>(tiles, n, q, out); }
void prototype_q3(const uint8_t* tiles, int n, const float* q, float* out) { attn_v3<F3, 4, 1, 0>(tiles, n, q, out); }
void prototype_q2(const uint8_t* tiles, int n, const float* q, float* out) { attn_v3<F2, 4, 1, 0>(tiles, n, q, out); }
}
