// ISA unit "avx2": the only code compiled with its flags. Everything but the table is in anonymous namespaces.
#include "kernels/emit.inl.h"
#include "simd/avx2.h"

namespace kvpack {
extern const KernelTable kTable_avx2;
const KernelTable kTable_avx2 = emit<Avx2>("avx2");
}  // namespace kvpack
