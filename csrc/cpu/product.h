// Matrix products of our own, with what goes with them, for what the library is slow at
// (`product_serves`): small ones, and on processors whose AVX-512 it leaves unused, large ones too.
// Those of bfloat16 and float16 are summed in float32 and rounded once; in bfloat16 by pairs where
// the processor multiplies them (product_pairs.cpp).
#pragma once

#include <cstdint>

#include <torch/headeronly/util/BFloat16.h>

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
// over `inner` in an order that depends on nothing but `inner`, the instruction set and, of few
// columns, or in float32 and float64 of small products on Intel's processors and with AVX2, the
// right matrix's layout and how many columns it has (`dots_serve`), of one column both matrices':
// never on the threads, and on the other rows only in that those of a product that is not small are
// not summed as a small one's are. out: column_stride 1.
template <typename scalar_t>
struct Product {
  Matrix<scalar_t> out;
  Matrix<const scalar_t> left, right;
  int64_t rows, inner, columns;
  bool accumulate = false;
  const scalar_t* bias = nullptr;  // or null
  bool relu = false;
  // Threads share the rows, and a few columns after them: by what out's neighbours are used with.
  // Not of pairs.
  bool by_rows = false;
  bool by_pairs = false;  // bfloat16 may be multiplied by pairs

  void run() const;

 private:
  void run_dots() const;
  bool has_few_rows() const;
  void run_few_rows() const;
  void run_wide(int64_t panel_columns) const;
  void run_thin(int64_t shares) const;
  void run_in_pieces() const;
  bool better_turned() const;
  void run_turned() const;
  void run_as_pairs() const;
};
template <>
void Product<torch::headeronly::BFloat16>::run_as_pairs() const;

// Whether this is one of Intel's processors: what MKL is fast at there it is not elsewhere.
bool is_intel();

// Whether our own kernel is the faster one on this machine for a product.
template <typename scalar_t>
bool product_serves(const Product<scalar_t>& product);

// Whether dot products (product_dots.cpp) are the faster ones for what our own kernel serves. Of
// one that is always ours, or small, a matter of `inner` and of the right matrix alone.
template <typename scalar_t>
bool dots_serve(const Product<scalar_t>& product);

// Whether it is for all of them, pairs apart, and not for small ones alone.
template <typename scalar_t>
bool all_products_serve();

// Whether it may be for one of so many multiplications.
template <typename scalar_t>
bool product_may_serve(int64_t multiplications);

// Whether this processor multiplies pairs of bfloat16, and none of the library's instructions is
// faster.
bool multiplies_pairs();
// Whether they serve this product, by its strides.
bool pairs_serve(const Product<torch::headeronly::BFloat16>& product);

}  // namespace torchext::cpu
