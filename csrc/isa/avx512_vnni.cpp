// ISA unit "avx512_vnni": the only code compiled with its flags. Everything but the table is in anonymous namespaces.
#include "simd/avx512_vnni.h"
#include "kernels/emit.inl.h"

namespace kvpack {
extern const KernelTable kTable_avx512_vnni;
const KernelTable kTable_avx512_vnni = emit<Avx512Vnni>("avx512_vnni");
}  // namespace kvpack
