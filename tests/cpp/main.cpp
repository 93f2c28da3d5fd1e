// Runs the tests of one executable: all, or those whose name holds the first argument.
//
// KVPACK_ISA pins the level. A level that is not available here ends the run with 77, which CTest reports as skipped.
#include <algorithm>
#include <chrono>
#include <string>

#include "check.h"
#include "kvpack/isa.h"

int main(int argc, char** argv) {
  constexpr int kSkipped = 77;
  const char* pinned = std::getenv("KVPACK_ISA");
  const std::string filter = argc > 1 ? argv[1] : "";
  if (pinned != nullptr && *pinned != '\0' && filter != "unknown_level") {
    const auto levels = kvpack::isa_available();
    if (std::find(levels.begin(), levels.end(), pinned) == levels.end()) {
      std::cout << "skipped: level " << pinned << " is not available here\n";
      return kSkipped;
    }
    std::cout << "level " << kvpack::isa_active() << '\n';
  }
  int64_t run = 0;
  for (const check::Test& test : check::tests()) {
    const std::string name = test.name;
    // A test named unknown_level needs an environment of its own: only on request.
    if (filter.empty() ? name == "unknown_level" : name.find(filter) == std::string::npos) continue;
    ++run;
    const int64_t before = check::failures;
    const auto start = std::chrono::steady_clock::now();
    try {
      test.body();
    } catch (const std::exception& e) {
      check::fail(test.name, 0, std::string("exception: ") + e.what());
    }
    check::contexts().clear();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::cout << (check::failures == before ? "ok      " : "FAILED  ") << name << "  " << seconds << " s" << std::endl;
  }
  for (const auto& [name, value] : check::measured()) std::cout << "measured  " << name << ": " << value << '\n';
  std::cout << run << " tests, " << check::checks << " checks, " << check::failures << " failures\n";
  return run == 0 || check::failures != 0 ? 1 : 0;
}
