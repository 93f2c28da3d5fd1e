// ISA unit "neon_dotprod": the only code compiled with its flags. Everything but the table is in anonymous namespaces.
#include "kernels/emit.inl.h"
#include "simd/neon.h"

namespace kvpack {
extern const KernelTable kTable_neon_dotprod;
const KernelTable kTable_neon_dotprod = emit<NeonDotprod>("neon_dotprod");
}  // namespace kvpack
