// The products that a batch of one has, for which packing would cost more than the product: one row
// on the left (forward, and the gradient of the input), and one inner step (that of the weight).
// The sums are those of product_tile, in the same order: a row's bits do not depend on the rows
// beside it.
#pragma once

#include "cpu/product_kernel.h"

namespace torchext::cpu {

// What ends a sum: product_tile's last lines.
template <int kLanes, typename scalar_t>
TORCHEXT_INLINE void finish_row(const Product<scalar_t>& p, int64_t column,
                                simd::Vector<scalar_t, kLanes> sum,
                                const simd::Vector<scalar_t, kLanes>* total, bool accumulate,
                                bool ends) {
  using Value = simd::Vector<scalar_t, kLanes>;
  const int64_t count = std::min<int64_t>(kLanes, p.columns - column);
  const bool whole = count == kLanes;
  const auto read = [&](const scalar_t* from) __attribute__((always_inline)) {
    return whole ? simd::load<kLanes>(from) : simd::load_tail<kLanes>(from, count, 0);
  };
  scalar_t* to = p.out.at(0, column);
  Value value = sum + (p.bias && ends ? read(p.bias + column) : Value{});
  if (total) value += *total;
  if (accumulate) value += read(to);
  if (p.relu && ends) value = value <= 0 ? Value{} : value;  // NaN stays NaN
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
  using Value = simd::Vector<scalar_t, kLanes>;
  const scalar_t* first;
  int64_t stride;

  // Adds steps [k + skipped, k + kLanes), times x.
  TORCHEXT_INLINE void add_square(const scalar_t* x, int64_t k, int64_t skipped, Value& sum) const {
    Value turned[kLanes];
    // Four from one address: see product_tile.
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) {
      turned[l] = simd::load<kLanes>((first + k + l / 4 * 4 * stride) + l % 4 * stride);
    }
    transpose_square(turned);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) {
      if (l >= skipped) sum += simd::broadcast<Value>(x + k + l) * turned[l];
    }
  }
};

// Vectors of a wide panel: enough sums that none waits for its last.
inline constexpr int kWide = 8;

// One panel of a product with one contiguous row `x`, over inner [begin, end), into `sum`.
template <int kLanes, typename scalar_t>
TORCHEXT_INLINE void row_panel(const Product<scalar_t>& p, int64_t column, int64_t begin,
                               int64_t end, simd::Vector<scalar_t, kLanes>* sum) {
  using Value = simd::Vector<scalar_t, kLanes>;
  const scalar_t *x = p.left.data, *from = p.right.at(0, column);
  const int64_t count = std::min<int64_t>(2 * kLanes, p.columns - column);
  const int64_t row = p.right.row_stride, stride = p.right.column_stride;
  int64_t k = begin;
  if (row == 1 && count == 2 * kLanes && end >= kLanes) {
    const ColumnsOfRow<kLanes, scalar_t> left{from, stride};
    const ColumnsOfRow<kLanes, scalar_t> right{from + kLanes * stride, stride};
    for (; k + kLanes <= end; k += kLanes) {
      left.add_square(x, k, 0, sum[0]);
      right.add_square(x, k, 0, sum[1]);
    }
    if (k < end) {  // a square that ends here, for its last steps
      left.add_square(x, end - kLanes, k - (end - kLanes), sum[0]);
      right.add_square(x, end - kLanes, k - (end - kLanes), sum[1]);
    }
    return;
  }
  for (; k < end; ++k) {
    scalar_t values[2 * kLanes] = {};
    for (int64_t j = 0; j < count; ++j) values[j] = from[j * stride + k * row];
    sum[0] += simd::broadcast<Value>(x + k) * simd::load<kLanes>(values);
    sum[1] += simd::broadcast<Value>(x + k) * simd::load<kLanes>(values + kLanes);
  }
}

// kWide vectors of columns of one whose right matrix has contiguous rows.
template <int kLanes, typename scalar_t>
TORCHEXT_INLINE void row_wide(const Product<scalar_t>& p, int64_t column, int64_t begin,
                              int64_t end, simd::Vector<scalar_t, kLanes>* sum) {
  using Value = simd::Vector<scalar_t, kLanes>;
  const scalar_t* from = p.right.at(begin, column);
  for (int64_t k = begin; k < end; ++k, from += p.right.row_stride) {
    const auto x = simd::broadcast<Value>(p.left.data + k);
#pragma GCC unroll 8
    for (int i = 0; i < kWide; ++i) sum[i] += x * simd::load<kLanes>(from + i * kLanes);
  }
}

// Panels [begin, end) of a product with one contiguous row.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void row_panels(const Product<scalar_t>& p, int64_t begin, int64_t end) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>, kPanel = kPanelOf<Isa, scalar_t>;
  static_assert(kPanel == 2 * kLanes);
  using Value = simd::Vector<scalar_t, kLanes>;
  const Parts<scalar_t> parts(p.inner);
  for (int64_t panel = begin; panel < end;) {
    const int64_t column = panel * kPanel;
    const bool wide = p.right.column_stride == 1 && panel + kWide / 2 <= end &&
                      column + kWide * kLanes <= p.columns;
    for (int64_t visit = 0; visit < parts.visits; ++visit) {
      Value sum[kWide], total[kWide];
      const int64_t first = parts.first_of(visit), last = parts.first_of(visit + 1);
      for (int64_t part = first; part < last; ++part) {
        if (part > first) {
          for (int i = 0; i < (wide ? kWide : 2); ++i) {
            total[i] = part == first + 1 ? sum[i] : total[i] + sum[i];
          }
        }
        for (int i = 0; i < (wide ? kWide : 2); ++i) sum[i] = Value{};
        if (wide) {
          row_wide<kLanes>(p, column, parts.begin_of(part), parts.begin_of(part + 1), sum);
        } else {
          row_panel<kLanes>(p, column, parts.begin_of(part), parts.begin_of(part + 1), sum);
        }
      }
      const bool accumulate = p.accumulate || visit > 0, ends = visit + 1 == parts.visits;
      for (int i = 0; i < (wide ? kWide : 2) && column + i * kLanes < p.columns; ++i) {
        finish_row<kLanes>(p, column + i * kLanes, sum[i], last - first > 1 ? &total[i] : nullptr,
                           accumulate, ends);
      }
    }
    panel += wide ? kWide / 2 : 1;
  }
}

// Rows [begin, end) of a product with one inner step and a contiguous right row.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void outer_rows(const Product<scalar_t>& p, int64_t begin, int64_t end) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>;
  using Value = simd::Vector<scalar_t, kLanes>;
  for (int64_t row = begin; row < end; ++row) {
    const auto x = simd::broadcast<Value>(p.left.at(row, 0));
    const scalar_t* y = p.right.data;
    int64_t column = 0;
    if (!p.bias && !p.relu && !p.accumulate) {
      scalar_t* to = p.out.at(row, 0);
      for (; column + kLanes <= p.columns; column += kLanes) {
        simd::store<kLanes>(to + column, Value{} + x * simd::load<kLanes>(y + column));
      }
    }
    Product<scalar_t> one = p;
    one.out.data = p.out.at(row, 0);
    for (; column < p.columns; column += kLanes) {
      const int64_t count = p.columns - column;
      const Value value = count >= kLanes ? simd::load<kLanes>(y + column)
                                          : simd::load_tail<kLanes>(y + column, count, 0);
      finish_row<kLanes>(one, column, Value{} + x * value, nullptr, p.accumulate, true);
    }
  }
}

}  // namespace torchext::cpu
