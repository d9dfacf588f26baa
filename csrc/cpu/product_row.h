// The products that a batch of one has, for which packing would cost more than the product: one row
// on the left (forward, and the gradient of the input), and one inner step (that of the weight).
// The sums are those of product_tile, in the same order: a row's bits do not depend on the rows
// beside it.
#pragma once

#include "cpu/product_kernel.h"

namespace torchext::cpu {

// A product with one row, or few, contiguous and in what sums are made in.
template <typename scalar_t>
struct RowProduct {
  const Product<scalar_t>* product;
  const acc_type<scalar_t>* left;
  int64_t left_stride;
};

// Numbers of a right matrix that is turned in registers for which another thread saves what it
// costs, of one row: forward of 1 x 100 x 512 takes 7.5 us by two and 8.7 by one, of 4 x 100 x
// 512 9.9 and 12.7 (Zen 4, float32).
inline int64_t turned_grain() { return int64_t{1} << (is_intel() ? 16 : 14); }

// Rows of 16-bit numbers, contiguous, and where they go as float32.
template <typename scalar_t>
struct LeftRows {
  Matrix<const scalar_t> from;
  int64_t columns;
  acc_type<scalar_t>* to;
};

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void copy_left_rows(const LeftRows<scalar_t>& left, int64_t begin, int64_t end) {
  const Matrix<const scalar_t> from{left.from.at(begin, 0), left.from.row_stride, 1};
  copy_rows<Isa>(from, end - begin, left.columns, left.to + begin * left.columns, left.columns);
}
TORCHEXT_SIMD_FUNCTION(widen_left, copy_left_rows, LeftRows)

// That of `product`, with a copy of its left matrix if need be, which the thread keeps.
template <typename scalar_t>
RowProduct<scalar_t> row_product(const Product<scalar_t>& product) {
  using acc_t = acc_type<scalar_t>;
  const Matrix<const scalar_t>& left = product.left;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    if (left.column_stride == 1) return {&product, left.data, left.row_stride};
  }
  acc_t* copy = scratch<acc_t>(0, product.rows * product.inner);
  if constexpr (!std::is_same_v<scalar_t, acc_t>) {
    if (left.column_stride == 1) {
      widen_left<scalar_t>({left, product.inner, copy}, 0, product.rows);
      return {&product, copy, product.inner};
    }
  }
  for (int64_t i = 0; i < product.rows; ++i) {
    for (int64_t k = 0; k < product.inner; ++k) copy[i * product.inner + k] = wide(*left.at(i, k));
  }
  return {&product, copy, product.inner};
}

// kLanes columns of a row of out, or as many as there are.
template <int kLanes, typename scalar_t>
TORCHEXT_INLINE simd::Vector<acc_type<scalar_t>, kLanes> read_out(const Product<scalar_t>& p,
                                                                  int64_t row, int64_t column) {
  const int64_t count = std::min<int64_t>(kLanes, p.columns - column);
  const scalar_t* from = p.out.at(row, column);
  return count == kLanes ? simd::load<kLanes>(from) : simd::load_tail<kLanes>(from, count, 0);
}

// What ends a sum: see finish_tile. `carried` is what visits before this one, or out
// where it is added to, have left.
template <int kLanes, typename scalar_t>
TORCHEXT_INLINE void finish_row(const Product<scalar_t>& p, int64_t row, int64_t column,
                                simd::Vector<acc_type<scalar_t>, kLanes> sum,
                                const simd::Vector<acc_type<scalar_t>, kLanes>* total,
                                simd::Vector<acc_type<scalar_t>, kLanes>& carried, bool accumulate,
                                bool ends) {
  using Value = simd::Vector<acc_type<scalar_t>, kLanes>;
  const int64_t count = std::min<int64_t>(kLanes, p.columns - column);
  const bool whole = count == kLanes;
  const auto read = [&](const scalar_t* from) __attribute__((always_inline)) {
    return whole ? simd::load<kLanes>(from) : simd::load_tail<kLanes>(from, count, 0);
  };
  scalar_t* to = p.out.at(row, column);
  Value value = sum;
  if (p.bias && ends) value += read(p.bias + column);
  if (total) value += *total;
  if (accumulate) value += carried;
  if (!ends) {
    carried = value;
    return;
  }
  if (p.relu) value = value <= 0 ? Value{} : value;  // NaN stays NaN
  if (whole) {
    simd::store<kLanes>(to, value);
  } else {
    simd::store_tail<kLanes>(to, value, count);
  }
}

// kLanes columns of a right matrix whose columns are contiguous, as a weight's are, over inner
// [begin, end): squares are turned in registers.
template <int kLanes, typename scalar_t>
struct ColumnsOfRow {
  using acc_t = acc_type<scalar_t>;
  using Value = simd::Vector<acc_t, kLanes>;
  const scalar_t* first;
  int64_t stride, last;  // the last column, again in the lanes past it

  // Adds steps [begin, end), times x; there are kLanes of them before end.
  template <bool kWhole>
  TORCHEXT_INLINE void add(const acc_t* x, int64_t begin, int64_t end, Value& sum) const {
    int64_t k = begin;
    for (; k + kLanes <= end; k += kLanes) add_square<kWhole>(x, k, 0, sum);
    // A square that ends here, for its last steps.
    if (k < end) add_square<kWhole>(x, end - kLanes, k - (end - kLanes), sum);
  }

  // Adds all of fewer than kLanes steps, times x.
  TORCHEXT_INLINE void add_short(const acc_t* x, int64_t steps, Value& sum) const {
    Value turned[kLanes];
    load_short_turned<kLanes, scalar_t>(
        [&](int l)
            __attribute__((always_inline)) { return first + std::min<int64_t>(l, last) * stride; },
        steps, turned);
    for (int64_t k = 0; k < steps; ++k) sum += simd::broadcast<Value>(x + k) * turned[k];
  }

  // Adds steps [k + skipped, k + kLanes), times x.
  template <bool kWhole>
  TORCHEXT_INLINE void add_square(const acc_t* x, int64_t k, int64_t skipped, Value& sum) const {
    Value turned[kLanes];
    // Four from one address: see product_tile.
    const auto row = [&](int l) __attribute__((always_inline)) {
      return kWhole ? (first + k + l / 4 * 4 * stride) + l % 4 * stride
                    : first + k + std::min<int64_t>(l, last) * stride;
    };
    load_turned<kLanes, scalar_t>(row, turned);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) {
      if (l >= skipped) sum += simd::broadcast<Value>(x + k + l) * turned[l];
    }
  }
};

// Vectors of columns whose sums are made together where the right matrix has contiguous rows: in
// the first cache, so that much of a row is read at a time. Its rows may be pages apart.
inline constexpr int kWide = 32;
inline constexpr int kRowsAtOnce = 4;

// One panel of a product with one row, over inner [begin, end), into `sum`.
template <int kLanes, typename scalar_t>
TORCHEXT_INLINE void row_panel(const RowProduct<scalar_t>& row_product, int64_t column,
                               int64_t begin, int64_t end,
                               simd::Vector<acc_type<scalar_t>, kLanes>* sum) {
  using acc_t = acc_type<scalar_t>;
  using Value = simd::Vector<acc_t, kLanes>;
  const Product<scalar_t>& p = *row_product.product;
  const acc_t* x = row_product.left;
  const scalar_t* from = p.right.at(0, column);
  const int64_t count = std::min<int64_t>(2 * kLanes, p.columns - column);
  const int64_t row = p.right.row_stride, stride = p.right.column_stride;
  int64_t k = begin;
  if (row == 1 && stride != 1) {
    const ColumnsOfRow<kLanes, scalar_t> left{from, stride, std::min<int64_t>(kLanes, count) - 1};
    const ColumnsOfRow<kLanes, scalar_t> right{from + kLanes * stride, stride, count - kLanes - 1};
    if (end < kLanes) {
      left.add_short(x, end, sum[0]);
      if (count > kLanes) right.add_short(x, end, sum[1]);
      return;
    }
    if (count <= kLanes) return left.template add<false>(x, begin, end, sum[0]);
    if (count < 2 * kLanes) {
      left.template add<true>(x, begin, end, sum[0]);
      return right.template add<false>(x, begin, end, sum[1]);
    }
    for (; k + kLanes <= end; k += kLanes) {
      left.template add_square<true>(x, k, 0, sum[0]);
      right.template add_square<true>(x, k, 0, sum[1]);
    }
    left.template add<true>(x, k, end, sum[0]);
    right.template add<true>(x, k, end, sum[1]);
    return;
  }
  const auto add = [&](const auto* values) __attribute__((always_inline)) {
    const auto value = simd::broadcast<Value>(x + k);
    sum[0] += value * simd::load<kLanes>(values);
    sum[1] += value * simd::load<kLanes>(values + kLanes);
  };
  const int64_t whole = stride == 1 ? readable_steps(p.inner, row, count, 2 * kLanes) : 0;
  for (; k < std::min(end, whole); ++k) add(from + k * row);
  for (; k < end; ++k) {
    acc_t values[2 * kLanes] = {};
    for (int64_t j = 0; j < count; ++j) values[j] = wide(from[j * stride + k * row]);
    add(values);
  }
}

// Adds kSteps inner steps from k on to `vectors` vectors of columns of kRows rows.
template <int kSteps, int kRows, int kLanes, typename scalar_t>
TORCHEXT_INLINE void add_steps(const RowProduct<scalar_t>& few, int64_t column, int64_t k,
                               int vectors,
                               simd::Vector<acc_type<scalar_t>, kLanes> (*sum)[kWide]) {
  using Value = simd::Vector<acc_type<scalar_t>, kLanes>;
  const auto& right = few.product->right;
  const scalar_t* from[kSteps];
  Value x[kRows][kSteps];
#pragma GCC unroll 4
  for (int i = 0; i < kSteps; ++i) {
    from[i] = right.at(k + i, column);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      x[r][i] = simd::broadcast<Value>(few.left + r * few.left_stride + k + i);
    }
  }
  for (int v = 0; v < vectors; ++v) {
    Value value[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) value[r] = sum[r][v];
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; ++i) {
      __builtin_prefetch(from[i] + kSteps * right.row_stride + v * kLanes);
      const Value loaded = simd::load<kLanes>(from[i] + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) value[r] += x[r][i] * loaded;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r][v] = value[r];
  }
}

// Inner steps [begin, end) of the same, where the right matrix has contiguous rows.
template <int kRows, int kLanes, typename scalar_t>
TORCHEXT_INLINE void row_wide(const RowProduct<scalar_t>& few, int64_t column, int64_t begin,
                              int64_t end, int vectors,
                              simd::Vector<acc_type<scalar_t>, kLanes> (*sum)[kWide]) {
  int64_t k = begin;
  for (; k + kRowsAtOnce <= end; k += kRowsAtOnce) {
    add_steps<kRowsAtOnce, kRows, kLanes>(few, column, k, vectors, sum);
  }
  for (; k < end; ++k) add_steps<1, kRows, kLanes>(few, column, k, vectors, sum);
}

// Panels [begin, end) of a product with one row.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void row_panels(const RowProduct<scalar_t>& row_product, int64_t begin,
                                int64_t end) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>, kPanel = kPanelOf<Isa, scalar_t>;
  static_assert(kPanel == 2 * kLanes);
  using Value = simd::Vector<acc_type<scalar_t>, kLanes>;
  const Product<scalar_t>& p = *row_product.product;
  const Parts<acc_type<scalar_t>> parts(p.inner);
  for (int64_t panel = begin; panel < end;) {
    const int64_t column = panel * kPanel;
    const int64_t whole = std::min(end, p.columns / kPanel) - panel;
    const bool many = p.right.column_stride == 1 && whole > 0;
    const int vectors = many ? static_cast<int>(std::min<int64_t>(2 * whole, kWide)) : 2;
    Value carried[kWide];
    for (int i = 0; p.accumulate && i < vectors && column + i * kLanes < p.columns; ++i) {
      carried[i] = read_out<kLanes>(p, 0, column + i * kLanes);
    }
    for (int64_t visit = 0; visit < parts.visits; ++visit) {
      Value sum[kWide], total[kWide];
      const int64_t first = parts.first_of(visit), last = parts.first_of(visit + 1);
      for (int64_t part = first; part < last; ++part) {
        if (part > first) {
          for (int i = 0; i < vectors; ++i) {
            total[i] = part == first + 1 ? sum[i] : total[i] + sum[i];
          }
        }
        for (int i = 0; i < vectors; ++i) sum[i] = Value{};
        if (many) {
          row_wide<1, kLanes>(row_product, column, parts.begin_of(part), parts.begin_of(part + 1),
                              vectors, &sum);
        } else {
          row_panel<kLanes>(row_product, column, parts.begin_of(part), parts.begin_of(part + 1),
                            sum);
        }
      }
      const bool accumulate = p.accumulate || visit > 0, ends = visit + 1 == parts.visits;
      for (int i = 0; i < vectors && column + i * kLanes < p.columns; ++i) {
        finish_row<kLanes>(p, 0, column + i * kLanes, sum[i],
                           last - first > 1 ? &total[i] : nullptr, carried[i], accumulate, ends);
      }
    }
    panel += vectors / 2;
  }
}

// Rows [begin, end) of a product with one inner step and a contiguous right row.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void outer_rows(const Product<scalar_t>& p, int64_t begin, int64_t end) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>;
  using Value = simd::Vector<acc_type<scalar_t>, kLanes>;
  for (int64_t row = begin; row < end; ++row) {
    const acc_type<scalar_t> left = wide(*p.left.at(row, 0));
    const auto x = simd::broadcast<Value>(&left);
    const scalar_t* y = p.right.data;
    int64_t column = 0;
    if (!p.bias && !p.relu && !p.accumulate) {
      scalar_t* to = p.out.at(row, 0);
      for (; column + kLanes <= p.columns; column += kLanes) {
        simd::store<kLanes>(to + column, Value{} + x * simd::load<kLanes>(y + column));
      }
    }
    for (; column < p.columns; column += kLanes) {
      const int64_t count = p.columns - column;
      const auto read = [&](const scalar_t* from) __attribute__((always_inline)) {
        return count >= kLanes ? simd::load<kLanes>(from) : simd::load_tail<kLanes>(from, count, 0);
      };
      Value carried = p.accumulate ? read(p.out.at(row, column)) : Value{};
      finish_row<kLanes>(p, row, column, Value{} + x * read(y + column), nullptr, carried,
                         p.accumulate, true);
    }
  }
}

}  // namespace torchext::cpu
