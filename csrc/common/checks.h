// Argument checks that reach Python as torch's own exception classes. The stable ABI has only
// RuntimeError (STD_TORCH_CHECK); the standard exceptions below cross it and are translated.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "common/stable.h"

namespace torchext {

template <typename... Args>
std::string message(const Args&... args) {
  std::ostringstream stream;
  (stream << ... << args);
  return stream.str();
}

// "[3, 5]", as torch prints sizes.
inline std::string shape_string(const Tensor& tensor) {
  std::ostringstream stream;
  stream << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) stream << (i ? ", " : "") << tensor.size(i);
  stream << ']';
  return stream.str();
}

inline const char* dtype_string(const Tensor& tensor) {
  return torch::headeronly::toString(tensor.scalar_type());
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

}  // namespace torchext

#define TORCHEXT_CHECK_AS(Error, condition, ...)                     \
  do {                                                               \
    if (!(condition)) throw Error(::torchext::message(__VA_ARGS__)); \
  } while (0)

#define TORCHEXT_CHECK(condition, ...) \
  TORCHEXT_CHECK_AS(std::runtime_error, condition, __VA_ARGS__)  // RuntimeError
#define TORCHEXT_CHECK_VALUE(condition, ...) \
  TORCHEXT_CHECK_AS(std::invalid_argument, condition, __VA_ARGS__)  // ValueError
#define TORCHEXT_CHECK_INDEX(condition, ...) \
  TORCHEXT_CHECK_AS(std::out_of_range, condition, __VA_ARGS__)  // IndexError
