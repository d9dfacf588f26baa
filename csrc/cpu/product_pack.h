// Copies of matrices as product_kernel.h and product_pairs.h read them: panels of the right one and
// strips of the left one, of bfloat16 and float16 in float32.
#pragma once

#include <algorithm>

#include "cpu/product.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"

namespace torchext::cpu {

// Inner steps of a panel of `count` contiguous columns at `from`, in rows `stride` apart, of which
// `width` columns can be read: past the panel's own stands the next row.
inline int64_t readable_steps(int64_t inner, int64_t stride, int64_t count, int64_t width) {
  if (count >= width) return inner;
  return stride == 0 ? 0 : std::max<int64_t>(0, inner - (width - count + stride - 1) / stride);
}

// A panel (inner, kPanel) of `count` columns; past them stands what no sum comes from.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void pack_panel(Matrix<const scalar_t> from, int64_t inner, int64_t count,
                                acc_type<scalar_t>* to) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>, kPanel = 2 * kLanes;
  if (from.column_stride != 1 && from.row_stride == 1) {
    using Value = simd::Vector<acc_type<scalar_t>, kLanes>;
    const bool blocks = turns_blocks<scalar_t, kLanes>(from.column_stride);
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t last = std::min<int64_t>(kLanes, count - i) - 1;  // again in the lanes past it
      const int64_t stride = from.column_stride;
      Value square[kLanes];
      if (inner < kLanes) {
        const auto row_or_last = [&](int l) __attribute__((always_inline)) {
          return from.at(0, i) + std::min<int64_t>(l, last) * stride;
        };
        load_short_turned<kLanes, scalar_t>(row_or_last, inner, square);
        for (int64_t k = 0; k < inner; ++k) simd::store<kLanes>(to + k * kPanel + i, square[k]);
        continue;
      }
      for (int64_t begin = 0; begin < inner; begin += kLanes) {
        const int64_t k = std::min(begin, inner - kLanes);  // the last square overlaps
        const scalar_t* first = from.at(k, i);
        // Four from one address: see product_tile.
        const auto row = [&](int l) __attribute__((always_inline)) {
          return (first + l / 4 * 4 * stride) + l % 4 * stride;
        };
        const auto row_or_last = [&](int l) __attribute__((always_inline)) {
          return first + std::min<int64_t>(l, last) * stride;
        };
        if (last == kLanes - 1 && blocks) {
          if constexpr (std::is_same_v<Value, simd::Vector<float, 16>> &&
                        std::is_same_v<scalar_t, float>) {
            load_turned_blocks(row, square);
          }
        } else if (last == kLanes - 1) {
          load_turned<kLanes, scalar_t>(row, square);
        } else {
          load_turned<kLanes, scalar_t>(row_or_last, square);
        }
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) simd::store<kLanes>(to + (k + l) * kPanel + i, square[l]);
      }
    }
    return;
  }
  const int64_t whole =
      from.column_stride == 1 ? readable_steps(inner, from.row_stride, count, kPanel) : 0;
  for (int64_t k = 0; k < inner; ++k, to += kPanel) {
    if (k < whole) {
      __builtin_prefetch(from.at(k + 16, 0));
      __builtin_prefetch(from.at(k + 16, kLanes));
      simd::store<kLanes>(to, simd::load<kLanes>(from.at(k, 0)));
      simd::store<kLanes>(to + kLanes, simd::load<kLanes>(from.at(k, kLanes)));
    } else {
      for (int64_t j = 0; j < count; ++j) to[j] = wide(*from.at(k, j));
      std::fill(to + count, to + kPanel, acc_type<scalar_t>{0});
    }
  }
}

// A strip (inner, rows): what a tile reads stands side by side.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void pack_strip(Matrix<const scalar_t> from, int64_t rows, int64_t inner,
                                acc_type<scalar_t>* to) {
  // Strips are short.
  constexpr int kLanes = sizeof(scalar_t) == 2 && Isa::kBytes >= 32 ? 8 : 16 / sizeof(*to);
  if (from.column_stride == 1) return copy_transposed<kLanes>(from, rows, inner, to, rows);
  if (from.row_stride == 1 && rows >= kLanes) {
    for (int64_t k = 0; k < inner; ++k, to += rows) {
      const scalar_t* column = from.at(0, k);
      for (int64_t i = 0; i + kLanes <= rows; i += kLanes) {
        simd::store<kLanes>(to + i, simd::load<kLanes>(column + i));
      }
      // The last ones, some of them again.
      simd::store<kLanes>(to + rows - kLanes, simd::load<kLanes>(column + rows - kLanes));
    }
    return;
  }
  for (int64_t k = 0; k < inner; ++k) {
    for (int64_t i = 0; i < rows; ++i) to[k * rows + i] = wide(*from.at(i, k));
  }
}

// Rows [0, rows) of a matrix whose rows are contiguous, `to_stride` apart in the copy.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void copy_rows(Matrix<const scalar_t> from, int64_t rows, int64_t columns,
                               acc_type<scalar_t>* to, int64_t to_stride) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>;
  for (int64_t i = 0; i < rows; ++i, to += to_stride) {
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      simd::store<kLanes>(to + j, simd::load<kLanes>(from.at(i, j)));
    }
    for (; j < columns; ++j) to[j] = wide(*from.at(i, j));
  }
}

}  // namespace torchext::cpu
