// Matrix products in float32 and float64 of our own, for what the library is slow at: small ones,
// and on processors whose AVX-512 it leaves unused, large ones too (`product_serves`).
#pragma once

#include <cstdint>

namespace torchext::cpu {

// Element (i, j) stands at data[i * row_stride + j * column_stride].
template <typename scalar_t>
struct Matrix {
  scalar_t* data;
  int64_t row_stride, column_stride;

  scalar_t* at(int64_t i, int64_t j) const { return data + i * row_stride + j * column_stride; }
};

// out (rows, columns) = left (rows, inner) @ right (inner, columns), and then, where asked for,
// plus what stood in out, plus bias (columns), and ReLU (NaN stays NaN). Each element is summed
// over `inner` in an order that depends on nothing but `inner` and the instruction set: neither on
// the threads nor on the other rows and columns. out: column_stride 1.
template <typename scalar_t>
struct Product {
  Matrix<scalar_t> out;
  Matrix<const scalar_t> left, right;
  int64_t rows, inner, columns;
  bool accumulate = false;
  const scalar_t* bias = nullptr;  // or null
  bool relu = false;
  // Threads share the rows, and a few columns after them: by what out's neighbours are used with.
  bool by_rows = false;

  void run() const;

 private:
  void run_thin(int64_t shares) const;
};

// Whether our own kernel takes products of so many multiplications on this machine.
bool product_serves(int64_t multiplications);

}  // namespace torchext::cpu
