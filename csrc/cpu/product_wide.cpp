// Products of few rows by a matrix whose rows are contiguous, as the gradient of the input is:
// many columns at a time, so that much of a row of the matrix is read at once. Panel by panel, as
// product_tile reads it, two vectors of each row are, which may be pages apart. The sums are those
// of product_tile, in the same order.
#include "cpu/dispatch.h"
#include "cpu/product_row.h"

namespace torchext::cpu {
namespace {

// Numbers of the right matrix for which another thread saves what it costs.
constexpr int64_t kWideGrain = int64_t{1} << 17;

// Whole panels [begin, end).
template <class Isa, typename scalar_t, int kRows>
TORCHEXT_INLINE void wide_panels(const RowProduct<scalar_t>& few, int64_t begin, int64_t end) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>, kPanel = kPanelOf<Isa, scalar_t>;
  using Value = simd::Vector<acc_type<scalar_t>, kLanes>;
  const Product<scalar_t>& p = *few.product;
  const Parts<acc_type<scalar_t>> parts(p.inner);
  Value sum[kRows][kWide], total[kRows][kWide], carried[kRows][kWide];
  for (int64_t panel = begin; panel < end; panel += kWide / 2) {
    const int64_t column = panel * kPanel;
    const int vectors = static_cast<int>(std::min<int64_t>(2 * (end - panel), kWide));
    const auto for_all = [&](auto use) __attribute__((always_inline)) {
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < vectors; ++v) use(r, v);
      }
    };
    if (p.accumulate) {
      for_all([&](int r, int v) __attribute__((always_inline)) {
        carried[r][v] = read_out<kLanes>(p, r, column + v * kLanes);
      });
    }
    for (int64_t visit = 0; visit < parts.visits; ++visit) {
      const int64_t first = parts.first_of(visit), last = parts.first_of(visit + 1);
      for (int64_t part = first; part < last; ++part) {
        if (part > first) {
          for_all([&](int r, int v) __attribute__((always_inline)) {
            total[r][v] = part == first + 1 ? sum[r][v] : total[r][v] + sum[r][v];
          });
        }
        for_all([&](int r, int v) __attribute__((always_inline)) { sum[r][v] = Value{}; });
        row_wide<kRows, kLanes>(few, column, parts.begin_of(part), parts.begin_of(part + 1),
                                vectors, sum);
      }
      const bool accumulate = p.accumulate || visit > 0, ends = visit + 1 == parts.visits;
      for_all([&](int r, int v) __attribute__((always_inline)) {
        finish_row<kLanes>(p, r, column + v * kLanes, sum[r][v],
                           last - first > 1 ? &total[r][v] : nullptr, carried[r][v], accumulate,
                           ends);
      });
    }
  }
}

// Of the 2 to 4 rows that there are (`kWideRows`).
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void wide_rows(const RowProduct<scalar_t>& few, int64_t begin, int64_t end) {
  const int64_t rows = few.product->rows;
  if (rows == 2) return wide_panels<Isa, scalar_t, 2>(few, begin, end);
  if (rows == 3) return wide_panels<Isa, scalar_t, 3>(few, begin, end);
  wide_panels<Isa, scalar_t, 4>(few, begin, end);
}
TORCHEXT_SIMD_FUNCTION(run_wide_rows, wide_rows, RowProduct)

}  // namespace

template <typename scalar_t>
void Product<scalar_t>::run_wide(int64_t panel_columns) const {
  const RowProduct<scalar_t> few = row_product(*this);
  const int64_t panels = columns / panel_columns;
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t shares = std::clamp<int64_t>(inner * columns / kWideGrain, 1, threads);
  for_each_block(panels, divide_up(panels, shares),
                 [&](int64_t begin, int64_t end) { run_wide_rows<scalar_t>(few, begin, end); });
  if (columns == panels * panel_columns) return;
  Product rest = *this;
  rest.by_pairs = false;  // as the whole is not
  rest.columns = columns - panels * panel_columns;
  rest.out.data = out.at(0, panels * panel_columns);
  rest.right.data = right.at(0, panels * panel_columns);
  if (bias) rest.bias = bias + panels * panel_columns;
  rest.run();
}

template void Product<float>::run_wide(int64_t panel_columns) const;
template void Product<double>::run_wide(int64_t panel_columns) const;
template void Product<simd::BFloat16>::run_wide(int64_t panel_columns) const;
template void Product<simd::Half>::run_wide(int64_t panel_columns) const;

}  // namespace torchext::cpu
