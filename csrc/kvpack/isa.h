// Instruction-set levels: which exist on this machine, which one is in use.
#pragma once
#include <string>
#include <vector>

namespace kvpack {

struct KernelTable;

// Names of the levels that were compiled in and that this machine can run, slowest first.
std::vector<std::string> isa_available();
// The level in use: the last available one, unless KVPACK_ISA or isa_use() pinned another.
std::string isa_active();
// Pins a level; throws std::invalid_argument for one that is not available.
void isa_use(const std::string& name);
// The table of the active level. One load; call it once per operation.
const KernelTable& kernels();

}  // namespace kvpack
