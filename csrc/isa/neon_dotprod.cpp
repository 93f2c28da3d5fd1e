// ISA unit "neon_dotprod": readers only, the rest is "neon"'s. The only code compiled with its flags; everything but
// the table is in anonymous namespaces.
#include "kernels/emit.inl.h"
#include "simd/neon.h"

namespace kvpack {
extern const Readers kReaders_neon_dotprod;
const Readers kReaders_neon_dotprod = emit_readers<NeonDotprod>();
}  // namespace kvpack
