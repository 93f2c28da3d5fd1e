// ISA unit "avx2": the only code compiled with its flags. Everything but the table is in anonymous namespaces.
#include "simd/avx2.h"
#include "kernels/emit.inl.h"

namespace kvpack {
extern const KernelTable kTable_avx2;
const KernelTable kTable_avx2 = emit<Avx2>("avx2");
}  // namespace kvpack
