// gzip, as the files of MNIST are distributed: RFC 1951 and 1952. Small and without a dependency.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace gzip {

using Bytes = std::vector<uint8_t>;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The bits of the compressed stream, from the lowest of each byte up.
class BitReader {
 public:
  BitReader(const Bytes& bytes, size_t position) : bytes_(bytes), next_(position) {}

  uint32_t bits(int count) {
    while (held_ < count) {
      if (next_ == bytes_.size()) throw Error("it ends in the middle of the compressed data");
      buffer_ |= uint64_t{bytes_[next_++]} << held_;
      held_ += 8;
    }
    const uint32_t value = static_cast<uint32_t>(buffer_ & ((uint64_t{1} << count) - 1));
    buffer_ >>= count;
    held_ -= count;
    return value;
  }

  uint32_t byte() { return bits(8); }
  uint32_t bit() { return bits(1); }
  void to_byte_boundary() { bits(held_ % 8); }

  // After a whole number of bytes: files may be padded with zeros.
  bool only_zeros_left() {
    while (next_ < bytes_.size() && bytes_[next_] == 0) ++next_;
    return next_ == bytes_.size();
  }

 private:
  const Bytes& bytes_;
  size_t next_;
  uint64_t buffer_ = 0;
  int held_ = 0;
};

// A canonical Huffman code, decoded a bit at a time: for each length the number of its codes, and
// all symbols in the order of their codes.
class Huffman {
 public:
  Huffman(const uint8_t* lengths, int symbols) {
    for (int i = 0; i < symbols; ++i) ++count_[lengths[i]];
    count_[0] = 0;
    std::array<int, 17> offset{};
    int unused = 1;
    for (int length = 1; length <= 15; ++length) {
      unused = 2 * unused - count_[length];
      if (unused < 0) throw Error("a Huffman code has too many symbols");
      offset[length + 1] = offset[length] + count_[length];
    }
    for (int i = 0; i < symbols; ++i) {
      if (lengths[i] != 0) symbol_[offset[lengths[i]]++] = static_cast<uint16_t>(i);
    }
  }

  int decode(BitReader& in) const {
    int code = 0, first = 0, index = 0;
    for (int length = 1; length <= 15; ++length) {
      code |= static_cast<int>(in.bit());
      if (code - first < count_[length]) return symbol_[index + code - first];
      index += count_[length];
      first = (first + count_[length]) << 1;
      code <<= 1;
    }
    throw Error("an undefined Huffman code");
  }

 private:
  std::array<int, 16> count_{};
  std::array<uint16_t, 288> symbol_{};
};

inline void inflate_stored(BitReader& in, Bytes& out, size_t most) {
  in.to_byte_boundary();
  const uint32_t length = in.bits(16);
  if (length != (in.bits(16) ^ 0xffff)) throw Error("the length of a stored block is damaged");
  for (uint32_t i = 0; i < length && out.size() < most; ++i) {
    out.push_back(static_cast<uint8_t>(in.byte()));
  }
}

inline void inflate_codes(BitReader& in, const Huffman& literals, const Huffman& distances,
                          Bytes& out, size_t start, size_t most) {
  while (out.size() < most) {
    const int symbol = literals.decode(in);
    if (symbol < 256) {
      out.push_back(static_cast<uint8_t>(symbol));
      continue;
    }
    if (symbol == 256) return;
    if (symbol > 285) throw Error("an undefined length");
    // Lengths 3 to 10 have a symbol each, then 4 symbols share one, two, ... more bits.
    int length = symbol - 257 + 3;
    if (symbol == 285) {
      length = 258;
    } else if (symbol >= 265) {
      const int extra = (symbol - 261) / 4;
      length = 3 + ((4 + (symbol - 261) % 4) << extra) + static_cast<int>(in.bits(extra));
    }
    const int code = distances.decode(in);
    if (code > 29) throw Error("an undefined distance");
    size_t distance = code + 1;
    if (code >= 4) {
      const int extra = code / 2 - 1;
      distance = 1 + (size_t(2 + code % 2) << extra) + in.bits(extra);
    }
    if (distance > out.size() - start) throw Error("a distance reaches before the start");
    for (; length > 0 && out.size() < most; --length) out.push_back(out[out.size() - distance]);
  }
}

inline void inflate_dynamic(BitReader& in, Bytes& out, size_t start, size_t most) {
  static constexpr uint8_t kOrder[19] = {16, 17, 18, 0, 8,  7, 9,  6, 10, 5,
                                         11, 4,  12, 3, 13, 2, 14, 1, 15};
  const int literals = static_cast<int>(in.bits(5)) + 257;
  const int distances = static_cast<int>(in.bits(5)) + 1;
  const int codes = static_cast<int>(in.bits(4)) + 4;
  if (literals > 286 || distances > 30) throw Error("a Huffman code has too many symbols");
  std::array<uint8_t, 286 + 30 + 138> lengths{};  // the last repeat may go over the end
  for (int i = 0; i < codes; ++i) lengths[kOrder[i]] = static_cast<uint8_t>(in.bits(3));
  const Huffman code_lengths(lengths.data(), 19);
  lengths.fill(0);
  for (int i = 0; i < literals + distances;) {
    const int symbol = code_lengths.decode(in);
    if (symbol < 16) {
      lengths[i++] = static_cast<uint8_t>(symbol);
      continue;
    }
    if (symbol == 16 && i == 0) throw Error("a repeated code length has none before it");
    const uint8_t value = symbol == 16 ? lengths[i - 1] : 0;
    const uint32_t repeat = symbol == 16   ? 3 + in.bits(2)
                            : symbol == 17 ? 3 + in.bits(3)
                                           : 11 + in.bits(7);
    for (uint32_t j = 0; j < repeat; ++j) lengths[i++] = value;
    if (i > literals + distances) throw Error("too many code lengths");
  }
  inflate_codes(in, Huffman(lengths.data(), literals), Huffman(&lengths[literals], distances), out,
                start, most);
}

inline void inflate_fixed(BitReader& in, Bytes& out, size_t start, size_t most) {
  std::array<uint8_t, 288> lengths{};
  for (int i = 0; i < 288; ++i) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
  std::array<uint8_t, 30> distances{};
  distances.fill(5);
  inflate_codes(in, Huffman(lengths.data(), 288), Huffman(distances.data(), 30), out, start, most);
}

inline uint32_t crc32(const uint8_t* begin, const uint8_t* end) {
  static const auto table = [] {
    std::array<uint32_t, 256> values{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = value & 1 ? (value >> 1) ^ 0xedb88320u : value >> 1;
      values[i] = value;
    }
    return values;
  }();
  uint32_t crc = 0xffffffffu;
  for (; begin != end; ++begin) crc = (crc >> 8) ^ table[(crc ^ *begin) & 0xff];
  return crc ^ 0xffffffffu;
}

inline void skip_header(BitReader& in) {
  if (in.bits(16) != 0x8b1f) throw Error("not a gzip file");
  if (in.byte() != 8) throw Error("an unknown compression method");
  const uint32_t flags = in.byte();
  for (int i = 0; i < 6; ++i) in.byte();  // time, extra flags, system
  if (flags & 4) {
    for (uint32_t left = in.bits(16); left > 0; --left) in.byte();
  }
  for (const uint32_t text : {8u, 16u}) {  // name, comment
    while ((flags & text) && in.byte() != 0) {
    }
  }
  if (flags & 2) in.bits(16);
}

// The contents of a gzip file, at most `most` bytes of them: what comes after those is not checked.
inline Bytes decompress(const Bytes& file, size_t most) {
  Bytes out;
  BitReader in(file, 0);
  do {  // a file is one member or more
    const size_t start = out.size();
    skip_header(in);
    for (bool last = false; !last && out.size() < most;) {
      last = in.bit() != 0;
      const uint32_t type = in.bits(2);
      if (type == 0) {
        inflate_stored(in, out, most);
      } else if (type == 1) {
        inflate_fixed(in, out, start, most);
      } else if (type == 2) {
        inflate_dynamic(in, out, start, most);
      } else {
        throw Error("an undefined type of block");
      }
    }
    if (out.size() >= most) break;
    in.to_byte_boundary();
    if (in.bits(32) != crc32(out.data() + start, out.data() + out.size())) {
      throw Error("its checksum is wrong");
    }
    if (in.bits(32) != static_cast<uint32_t>(out.size() - start)) throw Error("its size is wrong");
  } while (!in.only_zeros_left());
  return out;
}

}  // namespace gzip
