// ISA unit "avx512_vbmi": the only code compiled with its flags. Everything but the table is in anonymous namespaces.
#include "kernels/emit.inl.h"
#include "simd/avx512_vnni.h"

namespace kvpack {
extern const KernelTable kTable_avx512_vbmi;
const KernelTable kTable_avx512_vbmi = emit<Avx512Vbmi>("avx512_vbmi");
}  // namespace kvpack
