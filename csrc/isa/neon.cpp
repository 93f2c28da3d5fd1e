// ISA unit "neon": the only code compiled with its flags. Everything but the table is in anonymous namespaces.
#include "simd/neon.h"
#include "kernels/emit.inl.h"

namespace kvpack {
extern const KernelTable kTable_neon;
const KernelTable kTable_neon = emit<Neon>("neon");
}  // namespace kvpack
