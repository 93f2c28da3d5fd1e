// ISA unit "scalar": the only code compiled with its flags. Everything but the table is in anonymous namespaces.
#include "kernels/emit.inl.h"
#include "simd/scalar.h"

namespace kvpack {
extern const KernelTable kTable_scalar;
const KernelTable kTable_scalar = emit<Scalar>("scalar");
}  // namespace kvpack
