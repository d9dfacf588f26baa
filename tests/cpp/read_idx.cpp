// Reads an IDX file with the examples' reader and says what came of it, for tests/test_cpp.py:
//   read_idx FILE DIMS   prints the sizes and a sum over the values, or the error with exit code 2
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "data.h"

int main(int argc, char** argv) {
  if (argc != 3) return 1;
  try {
    const data::Idx idx = data::read_idx(argv[1], std::atoi(argv[2]));
    uint64_t sum = 0, place = 0;
    for (const uint8_t value : idx.values) sum += ++place * value;
    for (const uint64_t size : idx.sizes) std::printf("%s ", std::to_string(size).c_str());
    std::printf("%s\n", std::to_string(sum).c_str());
    return 0;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
}
