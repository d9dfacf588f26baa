// The four IDX files of a data set of digits, in MNIST's layout: found, read and checked as
// torchext/data does it, with the same messages.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "inflate.h"

namespace data {

using Bytes = std::vector<uint8_t>;
using Path = std::filesystem::path;

constexpr int kClasses = 10;

// A file is damaged or missing, or the files do not fit together. The message names the file.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

// The bytes of an IDX file. A file is two zero bytes, a type code, the number of dimensions, each
// dimension as a big-endian 32-bit integer, then the values.
struct Idx {
  std::vector<uint64_t> sizes;
  Bytes values;
};

// Images (N, height, width) and labels (N) to train on, and held-out ones to test on.
struct Digits {
  Idx train_images, train_labels, test_images, test_labels;
};

inline Bytes read_file(const Path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path.string(), ": cannot be opened");
  Bytes bytes(std::filesystem::file_size(path));
  if (!file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size())))
    fail(path.string(), ": cannot be read");
  return bytes;
}

inline uint32_t big_endian(const uint8_t* bytes) {
  return uint32_t{bytes[0]} << 24 | uint32_t{bytes[1]} << 16 | uint32_t{bytes[2]} << 8 | bytes[3];
}

inline std::string hex(uint32_t value, int digits) {
  std::array<char, 16> text;
  std::snprintf(text.data(), text.size(), "0x%0*x", digits, value);
  return text.data();
}

// The sizes in a file of which `bytes` is the start. `dims` is how many there must be; 0: any.
inline std::vector<uint64_t> read_header(const Bytes& bytes, const std::string& path, int dims) {
  if (bytes.size() < 4)
    fail(path, ": truncated: the magic number takes 4 bytes, the file has ", bytes.size());
  const uint32_t magic = big_endian(bytes.data());
  if (bytes[0] != 0 || bytes[1] != 0)
    fail(path, ": not an IDX file: expected magic 0x000008NN, got ", hex(magic, 8),
         bytes[0] == 0x1f && bytes[1] == 0x8b ? " (a gzip file? its name must then end in .gz)"
                                              : "");
  if (bytes[2] != 0x08) {
    static constexpr const char* kTypes[] = {"int8",  "unknown", "int16",
                                             "int32", "float32", "float64"};
    const int other = bytes[2] - 0x09;
    fail(path, ": expected type code 0x08 (uint8), got ", hex(bytes[2], 2), " (",
         other >= 0 && other < 6 ? kTypes[other] : "unknown", ")");
  }
  const size_t count = bytes[3];
  if (count == 0 || (dims != 0 && count != static_cast<size_t>(dims)))
    fail(path, ": expected ", dims == 0 ? "1 or more" : std::to_string(dims), " dimensions, got ",
         count, " (magic ", hex(magic, 8), ")");
  if (bytes.size() < 4 + 4 * count)
    fail(path, ": truncated: the header takes ", 4 + 4 * count, " bytes, the file has ",
         bytes.size());
  std::vector<uint64_t> sizes;
  std::string list;
  for (size_t i = 0; i < count; ++i) {
    sizes.push_back(big_endian(&bytes[4 + 4 * i]));
    list += (i ? ", " : "") + std::to_string(sizes[i]);
  }
  if (std::find(sizes.begin(), sizes.end(), 0u) != sizes.end())
    fail(path, ": holds no values: its sizes are (", list, count == 1 ? ",)" : ")");
  return sizes;
}

// Reads a file, plain or (if its name ends in .gz) compressed. The header is believed only as far
// as the file bears it out: no more memory is taken than the file can have bytes.
inline Idx read_idx(const Path& file, int dims = 0) {
  const std::string path = file.string();
  const Bytes stored = read_file(file);
  const bool compressed = file.extension() == ".gz";
  // A compressed file tells its true size only at the end: deflate shrinks by 1032 at most.
  const uint64_t most = compressed ? uint64_t{stored.size()} * 1032 : stored.size();
  try {
    Bytes bytes = compressed ? gzip::decompress(stored, 4 + 4 * 255) : stored;
    std::vector<uint64_t> sizes = read_header(bytes, path, dims);
    const uint64_t header = 4 + 4 * sizes.size();
    uint64_t expected = 1;
    for (const uint64_t size : sizes) {
      if (__builtin_mul_overflow(expected, size, &expected))
        fail(path, ": its sizes are too large");
    }
    if (most < header || expected > most - header)
      fail(path, ": truncated: the header promises ", expected,
           " bytes of values, the file has at "
           "most ",
           most < header ? 0 : most - header);
    if (compressed) bytes = gzip::decompress(stored, header + expected + 1);
    const uint64_t got = bytes.size() - header;
    if (got < expected)
      fail(path, ": truncated: the header promises ", expected, " bytes of values, the file has ",
           got);
    if (got > expected)
      fail(path, ": trailing bytes: the header promises ", expected,
           " bytes of values, the file has ", compressed ? "more than " : "",
           compressed ? expected : got);
    bytes.erase(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(header));
    return {std::move(sizes), std::move(bytes)};
  } catch (const gzip::Error& error) {
    fail(path, ": damaged gzip file of ", stored.size(), " bytes: ", error.what());
  }
}

inline Path find(const Path& folder, const std::string& part, const std::string& kind,
                 const std::string& dims) {
  std::string names;
  for (const char* end : {"", ".gz"}) {
    for (const char* mark : {"-", "."}) {
      const std::string name = part + "-" + kind + mark + dims + "-ubyte" + end;
      if (std::filesystem::is_regular_file(folder / name)) return folder / name;
      names += (names.empty() ? "" : ", ") + name;
    }
  }
  fail(folder.string(), ": none of ", names, " is there");
}

inline void check_pair(const Idx& images, const Idx& labels, const Path& images_path,
                       const Path& labels_path) {
  if (images.sizes[0] != labels.sizes[0])
    fail(labels_path.string(), ": it has ", labels.sizes[0], " labels, ", images_path.string(),
         " has ", images.sizes[0], " images");
  const auto wrong = std::find_if(labels.values.begin(), labels.values.end(),
                                  [](uint8_t label) { return label >= kClasses; });
  if (wrong != labels.values.end())
    fail(labels_path.string(), ": labels must be 0 to ", kClasses - 1, ", got ", int{*wrong},
         " at index ", wrong - labels.values.begin());
}

// Reads a data set: "digits", the one that comes with torchext, or a folder. Each file may be
// spelled train-images-idx3-ubyte or train-images.idx3-ubyte, plain or .gz.
inline Digits load_digits(const std::string& name) {
  const Path folder = name == "digits" ? Path(TORCHEXT_DIGITS) : Path(name);
  if (!std::filesystem::exists(folder)) fail(folder.string(), ": no such folder");
  if (!std::filesystem::is_directory(folder)) fail(folder.string(), ": not a folder");
  std::vector<Path> paths;
  for (const char* part : {"train", "t10k"}) {
    paths.push_back(find(folder, part, "images", "idx3"));
    paths.push_back(find(folder, part, "labels", "idx1"));
  }
  Digits digits{read_idx(paths[0], 3), read_idx(paths[1], 1), read_idx(paths[2], 3),
                read_idx(paths[3], 1)};
  check_pair(digits.train_images, digits.train_labels, paths[0], paths[1]);
  check_pair(digits.test_images, digits.test_labels, paths[2], paths[3]);
  const auto &one = digits.train_images.sizes, &other = digits.test_images.sizes;
  if (one[1] != other[1] || one[2] != other[2])
    fail(paths[2].string(), ": its images are ", other[1], " x ", other[2], ", those of ",
         paths[0].string(), " are ", one[1], " x ", one[2]);
  return digits;
}

}  // namespace data
