// ISA unit "scalar": the only code compiled with its flags. Everything but the table is in anonymous namespaces.
#include "simd/scalar.h"
#include "kernels/emit.inl.h"

namespace kvpack {
extern const KernelTable kTable_scalar;
const KernelTable kTable_scalar = emit<Scalar>("scalar");
}  // namespace kvpack
