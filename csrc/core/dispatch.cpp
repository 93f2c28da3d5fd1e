// Picks the kernel table: once at load from the machine and KVPACK_ISA, later by isa_use().
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels/table.h"
#include "kvpack/isa.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace kvpack {

// Of the levels that this build has (KVPACK_LEVEL_<name>).
extern const KernelTable kTable_scalar, kTable_avx2, kTable_avx512_vnni, kTable_neon;
extern const Readers kReaders_avx_vnni, kReaders_avx512_vbmi, kReaders_neon_dotprod;

namespace {

#ifdef __x86_64__
bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

// Not every compiler knows this one by name.
[[maybe_unused]] bool has_avx_vnni() {
#ifdef KVPACK_EVEX_VNNI
  return has_avx512_vnni();
#else
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
#endif
}
#endif

// A level that differs from another one in its readers.
[[maybe_unused]] KernelTable derived(const char* name, const KernelTable& from, const Readers& readers) {
  KernelTable table = from;
  static_cast<Readers&>(table) = readers;
  table.name = name;
  return table;
}

std::vector<const KernelTable*> detect() {
  std::vector<const KernelTable*> tables{&kTable_scalar};
#ifdef __x86_64__
  __builtin_cpu_init();
#ifdef KVPACK_LEVEL_avx2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables.push_back(&kTable_avx2);
#ifdef KVPACK_LEVEL_avx_vnni
    static const KernelTable avx_vnni = derived("avx_vnni", kTable_avx2, kReaders_avx_vnni);
    if (has_avx_vnni()) tables.push_back(&avx_vnni);
#endif
  }
#endif
  if (has_avx512_vnni()) {
#ifdef KVPACK_LEVEL_avx512_vnni
    tables.push_back(&kTable_avx512_vnni);
#ifdef KVPACK_LEVEL_avx512_vbmi
    static const KernelTable avx512_vbmi = derived("avx512_vbmi", kTable_avx512_vnni, kReaders_avx512_vbmi);
    if (__builtin_cpu_supports("avx512vbmi")) tables.push_back(&avx512_vbmi);
#endif
#endif
  }
#endif
#ifdef KVPACK_LEVEL_neon
  tables.push_back(&kTable_neon);
  static const KernelTable neon_dotprod = derived("neon_dotprod", kTable_neon, kReaders_neon_dotprod);
#ifdef __linux__
  const bool has_dotprod = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
  const bool has_dotprod = true;
#else
  const bool has_dotprod = false;
#endif
  if (has_dotprod) tables.push_back(&neon_dotprod);
#endif
  return tables;
}

const std::vector<const KernelTable*>& tables() {
  static const std::vector<const KernelTable*> all = detect();
  return all;
}

const KernelTable* find(const std::string& name) {
  std::string known;
  for (const KernelTable* t : tables()) {
    if (name == t->name) return t;
    known += (known.empty() ? "" : ", ") + std::string(t->name);
  }
  throw std::invalid_argument("ISA level '" + name + "' is not available here; available: " + known);
}

const KernelTable* initial() {
  const char* pinned = std::getenv("KVPACK_ISA");
  return pinned != nullptr && *pinned != '\0' ? find(pinned) : tables().back();
}

std::atomic<const KernelTable*>& active() {
  static std::atomic<const KernelTable*> table{initial()};
  return table;
}

}  // namespace

std::vector<std::string> isa_available() {
  std::vector<std::string> names;
  for (const KernelTable* t : tables()) names.emplace_back(t->name);
  return names;
}

std::string isa_active() { return kernels().name; }
void isa_use(const std::string& name) { active().store(find(name), std::memory_order_relaxed); }
const KernelTable& kernels() { return *active().load(std::memory_order_relaxed); }

}  // namespace kvpack
