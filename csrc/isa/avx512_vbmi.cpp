// ISA unit "avx512_vbmi": readers only, the rest is "avx512_vnni"'s. The only code compiled with its flags; everything
// but the table is in anonymous namespaces.
#include "kernels/emit.inl.h"
#include "simd/avx512_vnni.h"

namespace kvpack {
extern const Readers kReaders_avx512_vbmi;
const Readers kReaders_avx512_vbmi = emit_readers<Avx512Vbmi>();
}  // namespace kvpack
