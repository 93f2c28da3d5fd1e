// ISA unit "avx_vnni": readers only, the rest is "avx2"'s. The only code compiled with its flags; everything but
// the table is in anonymous namespaces.
#include "simd/avx_vnni.h"
#include "kernels/emit.inl.h"

namespace kvpack {
extern const Readers kReaders_avx_vnni;
const Readers kReaders_avx_vnni = emit_readers<AvxVnni>();
}  // namespace kvpack
