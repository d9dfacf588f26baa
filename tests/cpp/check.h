// A test framework in a page: TEST(name) { ... } registers a test, EXPECT* throw where they fail.
#pragma once

#include <ATen/ATen.h>

#include <exception>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  std::ostringstream message;
  message << file << ":" << line << ": " << what;
  throw std::runtime_error(message.str());
}

// Equal in shape and dtype, and in each value up to tolerance * (1 + |expected|). NaN equals NaN.
inline void close(const at::Tensor& actual, const at::Tensor& expected, double tolerance,
                  const char* file, int line) {
  if (actual.defined() != expected.defined()) fail(file, line, "one of two tensors is undefined");
  if (!actual.defined()) return;
  std::ostringstream difference;
  if (actual.sizes() != expected.sizes() || actual.dtype() != expected.dtype()) {
    difference << actual.dtype() << actual.sizes() << " is not " << expected.dtype()
               << expected.sizes();
    fail(file, line, difference.str());
  }
  const at::NoGradGuard no_grad;
  const at::Tensor one = actual.to(at::kDouble), other = expected.to(at::kDouble);
  if (at::allclose(one, other, tolerance, tolerance, /*equal_nan=*/true)) return;
  difference << "the largest difference is " << (one - other).abs().max().item<double>();
  fail(file, line, difference.str());
}

// Runs the tests; those whose name holds `filter`.
inline int run(const std::string& filter) {
  int failures = 0, count = 0;
  for (const Test& test : tests()) {
    if (std::string(test.name).find(filter) == std::string::npos) continue;
    ++count;
    try {
      test.run();
    } catch (const std::exception& error) {
      ++failures;
      std::cerr << "FAILED " << test.name << ": " << error.what() << "\n";
    }
  }
  std::cout << count - failures << " of " << count << " tests passed\n";
  return failures > 0 || count == 0;
}

}  // namespace check

#define TEST(name)                                           \
  static void name();                                        \
  static const check::Register register_##name{#name, name}; \
  static void name()

#define EXPECT(condition)                                          \
  do {                                                             \
    if (!(condition)) check::fail(__FILE__, __LINE__, #condition); \
  } while (0)

#define EXPECT_CLOSE(actual, expected, tolerance) \
  check::close(actual, expected, tolerance, __FILE__, __LINE__)

// The statement throws, and the message holds `text`.
#define EXPECT_THROWS(statement, text)                                               \
  do {                                                                               \
    std::string what = "nothing was thrown by " #statement;                          \
    try {                                                                            \
      statement;                                                                     \
    } catch (const std::exception& error) {                                          \
      what = error.what();                                                           \
    }                                                                                \
    if (what.find(text) == std::string::npos) check::fail(__FILE__, __LINE__, what); \
  } while (0)
