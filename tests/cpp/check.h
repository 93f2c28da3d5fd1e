// The test harness: no framework. TEST bodies register themselves, CHECK macros print the expression, both values, the
// location and the enclosing contexts, count the failure and carry on. main.cpp runs the tests of one executable.
#pragma once
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

inline int64_t failures = 0, checks = 0;
inline std::vector<std::string>& contexts() {
  static std::vector<std::string> all;
  return all;
}

// KVPACK_TEST_FULL=1: the exhaustive matrix.
inline bool full() {
  const char* v = std::getenv("KVPACK_TEST_FULL");
  return v != nullptr && *v != '\0' && std::string(v) != "0";
}
// Under an emulator or sanitizers every check runs, on fewer repetitions.
constexpr bool slow() {
#ifdef KVPACK_TEST_SLOW
  return true;
#else
  return false;
#endif
}

// Where two levels share a slow machine's time: whether this case is the other one's. Asked once for each case; each
// level (KVPACK_TEST_HALF=0 or 1) has half of the answers, in an order that no nesting of loops repeats.
inline bool others() {
  static const char* half = std::getenv("KVPACK_TEST_HALF");
  static uint64_t asked = 0;
  return half != nullptr && *half - '0' != std::popcount(asked++) % 2;
}

// Names what is being tested, for the messages of failures inside its scope.
class Context {
 public:
  template <class... Parts>
  explicit Context(const Parts&... parts) {
    std::ostringstream s;
    (s << ... << parts);
    contexts().push_back(s.str());
  }
  ~Context() { contexts().pop_back(); }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
};

// Keeps the largest value under a name; printed at the end, so that a log shows how far from its bound a result is.
inline std::map<std::string, double>& measured() {
  static std::map<std::string, double> all;
  return all;
}
inline void measure(const std::string& name, double value) {
  const auto [at, fresh] = measured().try_emplace(name, value);
  if (!fresh && !(value <= at->second)) at->second = value;
}

inline void fail(const char* file, int line, const std::string& what) {
  constexpr int64_t kShown = 12;
  if (++failures > kShown) {
    if (failures == kShown + 1) std::cout << "  further failures are counted, not shown\n";
    return;
  }
  std::cout << file << ':' << line << ": " << what << '\n';
  for (const std::string& c : contexts()) std::cout << "    in " << c << '\n';
}

template <class T>
std::string show(const T& v) {
  std::ostringstream s;
  s.precision(9);
  if constexpr (sizeof(T) == 1)
    s << static_cast<int>(v);
  else
    s << v;
  return s.str();
}

template <class A, class B, class Compare>
bool compare(const A& a, const B& b, Compare holds, const char* text, const char* file, int line) {
  ++checks;
  if (holds(a, b)) return true;
  fail(file, line, std::string("CHECK failed: ") + text + "  with " + show(a) + " and " + show(b));
  return false;
}

// Runs f; it must throw std::invalid_argument (or another std::exception) whose message holds every one of `parts`.
template <class Exception, class F>
bool throws(F&& f, const std::vector<std::string>& parts, const char* text, const char* file, int line) {
  ++checks;
  try {
    f();
  } catch (const Exception& e) {
    const std::string message = e.what();
    for (const std::string& part : parts)
      if (message.find(part) == std::string::npos) {
        fail(file, line, std::string("CHECK_THROWS: ") + text + " says '" + message + "', which lacks '" + part + "'");
        return false;
      }
    return true;
  } catch (const std::exception& e) {
    fail(file, line, std::string("CHECK_THROWS: ") + text + " throws another type: " + e.what());
    return false;
  }
  fail(file, line, std::string("CHECK_THROWS: ") + text + " does not throw");
  return false;
}

}  // namespace check

#define TEST(name)                                                  \
  static void test_##name();                                        \
  static const check::Register register_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition) \
  (++check::checks, (condition) ? true : (check::fail(__FILE__, __LINE__, "CHECK failed: " #condition), false))
#define CHECK_COMPARE(a, op, b) \
  check::compare((a), (b), [](const auto& x, const auto& y) { return x op y; }, #a " " #op " " #b, __FILE__, __LINE__)
#define CHECK_EQ(a, b) CHECK_COMPARE(a, ==, b)
#define CHECK_NE(a, b) CHECK_COMPARE(a, !=, b)
#define CHECK_LE(a, b) CHECK_COMPARE(a, <=, b)
#define CHECK_LT(a, b) CHECK_COMPARE(a, <, b)
#define CHECK_GE(a, b) CHECK_COMPARE(a, >=, b)
// CHECK_THROWS(expression, "part of the message", ...)
#define CHECK_THROWS(expression, ...) \
  check::throws<std::invalid_argument>([&] { (void)(expression); }, {__VA_ARGS__}, #expression, __FILE__, __LINE__)
