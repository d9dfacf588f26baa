// Products of our own: how one is shared out, and what is packed when.
#include "cpu/product.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/product_kernel.h"
#include "cpu/product_row.h"

namespace torchext::cpu {
namespace {

// Rows for which the right matrix is packed by whoever needs it, panel by panel, and the left one
// is read as it stands.
constexpr int64_t kFewRows = 128;
// Rows of a block otherwise: packed, they stay in the second cache.
constexpr int64_t kBlockRows = 96;
// Steps of an inner dimension up to which threads may share rows (`Product::by_rows`): then each of
// them packs the whole right matrix.
constexpr int64_t kByRowsInner = 512;
// Panels from which on the left matrix is packed: for fewer it is read as often where it stands.
// 4096 x 784 by 784 x 64 takes 2.3 ms so, 2.9 packed; by 784 x 224 7.4 and 8.0 (Zen 4, float32).
constexpr int64_t kPackLeft = 8;
// The same where all rows of a strip begin in one set of the first cache: by 1024 x 160 7.4 packed,
// 8.3 where it stands.
constexpr int64_t kPackLeftCrowded = 5;
constexpr int64_t kCrowdedBytes = 4096;
// Bytes of panels that are packed at once.
constexpr int64_t kPackedBytes = int64_t{4} << 20;
// Bytes between the first and the last row of panels that are read where they stand.
constexpr int64_t kDirectBytes = int64_t{512} << 10;
// Multiplications below which another thread costs more than it saves.
constexpr int64_t kGrain = int64_t{1} << 18;
// Of a batch of one, where each reads an element from memory.
constexpr int64_t kThinGrain = int64_t{1} << 16;

template <typename scalar_t>
struct Tasks {
  const Product<scalar_t>* product;
  int64_t row_blocks, panel_groups;  // a task is one of both
  int64_t panel_begin, panel_end;    // shared by the groups
  int64_t visit_begin, visit_end;    // of out, one after the other
  scalar_t* packed;                  // the panels of one visit, or null
  bool pack_left, pack_right;
};

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void run_tasks(const Tasks<scalar_t>& tasks, int64_t begin, int64_t end) {
  const Product<scalar_t>& p = *tasks.product;
  const Parts<scalar_t> parts(p.inner);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t rows = task / tasks.panel_groups, group = task % tasks.panel_groups;
    const int64_t panels = tasks.panel_end - tasks.panel_begin;
    ProductBlock<scalar_t> block{};
    block.product = &p;
    block.row_begin = share(p.rows, tasks.row_blocks, rows);
    block.row_end = share(p.rows, tasks.row_blocks, rows + 1);
    block.panel_begin = tasks.panel_begin + share(panels, tasks.panel_groups, group);
    block.panel_end = tasks.panel_begin + share(panels, tasks.panel_groups, group + 1);
    block.pack_left = tasks.pack_left;
    block.pack_right = tasks.pack_right;
    for (int64_t visit = tasks.visit_begin; visit < tasks.visit_end; ++visit) {
      block.visit = visit;
      if (tasks.packed) {
        const int64_t steps = parts.begin_of_visit(visit + 1) - parts.begin_of_visit(visit);
        block.packed = tasks.packed +
                       (block.panel_begin - tasks.panel_begin) * steps * kPanelOf<Isa, scalar_t>;
      }
      product_block<Isa>(block);
    }
  }
}
TORCHEXT_SIMD_FUNCTION(run_product, run_tasks, Tasks)

// Panels [begin, end) of the tasks' one visit.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void pack_panels(const Tasks<scalar_t>& tasks, int64_t begin, int64_t end) {
  constexpr int kPanel = kPanelOf<Isa, scalar_t>;
  const Product<scalar_t>& p = *tasks.product;
  const Parts<scalar_t> parts(p.inner);
  const int64_t from = parts.begin_of_visit(tasks.visit_begin);
  const int64_t inner = parts.begin_of_visit(tasks.visit_end) - from;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = (tasks.panel_begin + i) * kPanel;
    pack_panel<Isa>({p.right.at(from, column), p.right.row_stride, p.right.column_stride}, inner,
                    std::min<int64_t>(kPanel, p.columns - column),
                    tasks.packed + i * inner * kPanel);
  }
}
TORCHEXT_SIMD_FUNCTION(pack_right, pack_panels, Tasks)

TORCHEXT_SIMD_FUNCTION(run_row, row_panels, Product)
TORCHEXT_SIMD_FUNCTION(run_outer, outer_rows, Product)

template <typename scalar_t>
int64_t panel_columns() {
  switch (simd::level()) {
    case simd::Level::kAvx512:
      return kPanelOf<simd::Avx512, scalar_t>;
    case simd::Level::kAvx2:
      return kPanelOf<simd::Avx2, scalar_t>;
    default:
      return kPanelOf<simd::Baseline, scalar_t>;
  }
}

}  // namespace

// Measured on Zen 5 (2 cores, float32, GFLOP/s of ours and of MKL 2024.2, which takes AVX2 there):
// 1024 x 1024 x 1024 445 and 208, 512 x 512 x 32000 400 and 200, 100 x 784 x 64 in one thread 217
// and 100. With AVX2 alone ours and MKL's are even from there on. Where MKL has AVX-512 of its own
// (Intel) large products stay with it.
template <typename scalar_t>
bool product_serves(const Product<scalar_t>& product) {
  const int64_t multiplications = product.rows * product.inner * product.columns;
  constexpr int64_t kSmall = int64_t{1} << 24;
  const simd::Level level = simd::level();
  if (level == simd::Level::kBaseline) return false;
  if (multiplications <= kSmall) return true;
#if defined(__x86_64__)
  static const bool intel = __builtin_cpu_is("intel");
  return level == simd::Level::kAvx512 && !intel;
#else
  return false;
#endif
}

template <typename scalar_t>
void Product<scalar_t>::run() const {
  if (rows == 0 || columns == 0) return;
  const int64_t panels = divide_up(columns, panel_columns<scalar_t>());
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t shares = std::clamp<int64_t>(rows * inner * columns / kGrain, 1, threads);
  if (rows == 1 || (inner == 1 && right.column_stride == 1)) {
    return run_thin(std::clamp<int64_t>(rows * inner * columns / kThinGrain, 1, threads));
  }
  const Parts<scalar_t> parts(inner);
  const bool direct =
      right.column_stride == 1 &&
      parts.longest() * right.row_stride * int64_t{sizeof(scalar_t)} <= kDirectBytes;
  Tasks<scalar_t> tasks{this, 1, 1, 0, panels, 0, parts.visits, nullptr, false, !direct};
  if (rows <= kFewRows || direct) {
    if (by_rows && rows >= shares && inner <= kByRowsInner) {
      tasks.row_blocks = std::max(shares, divide_up(rows, kFewRows));
    } else {
      tasks.panel_groups = std::min(panels, shares);
      tasks.row_blocks = std::max(divide_up(shares, tasks.panel_groups), divide_up(rows, kFewRows));
    }
    tasks.pack_left = panels / tasks.panel_groups >= kPackLeft;
    const int64_t count = tasks.row_blocks * tasks.panel_groups;
    for_each_block(count, divide_up(count, shares),
                   [&](int64_t begin, int64_t end) { run_product<scalar_t>(tasks, begin, end); });
    return;
  }
  const int64_t wide = panel_columns<scalar_t>();
  const int64_t at_once =
      std::max<int64_t>(1, kPackedBytes / (parts.longest() * wide * int64_t{sizeof(scalar_t)}));
  tasks.packed = scratch<scalar_t>(2, std::min(panels, at_once) * parts.longest() * wide);
  const bool crowded = left.row_stride * int64_t{sizeof(scalar_t)} % kCrowdedBytes == 0;
  tasks.pack_left = panels >= (crowded ? kPackLeftCrowded : kPackLeft);
  tasks.row_blocks = divide_up(rows, kBlockRows);
  for (int64_t first = 0; first < panels; first += at_once) {
    tasks.panel_begin = first;
    tasks.panel_end = std::min(panels, first + at_once);
    const int64_t here = tasks.panel_end - first;
    // Few tasks: as many for each thread.
    int64_t groups = divide_up(4 * shares, tasks.row_blocks);
    if (tasks.row_blocks * groups < 16 * shares && tasks.row_blocks % shares != 0) {
      groups = divide_up(groups, shares) * shares;
    }
    tasks.panel_groups = std::clamp<int64_t>(groups, 1, here);
    const int64_t count = tasks.row_blocks * tasks.panel_groups;
    for (int64_t visit = 0; visit < parts.visits; ++visit) {
      tasks.visit_begin = visit;
      tasks.visit_end = visit + 1;
      for_each_block(here, divide_up(here, shares),
                     [&](int64_t begin, int64_t end) { pack_right<scalar_t>(tasks, begin, end); });
      for_each_block(count, divide_up(count, shares),
                     [&](int64_t begin, int64_t end) { run_product<scalar_t>(tasks, begin, end); });
    }
  }
}

// A batch of one: see product_row.h.
template <typename scalar_t>
void Product<scalar_t>::run_thin(int64_t shares) const {
  if (rows > 1) {
    return for_each_block(rows, divide_up(rows, shares), [&](int64_t begin, int64_t end) {
      run_outer<scalar_t>(*this, begin, end);
    });
  }
  Product row = *this;
  if (left.column_stride != 1) {
    scalar_t* copy = scratch<scalar_t>(0, inner);
    for (int64_t k = 0; k < inner; ++k) copy[k] = *left.at(0, k);
    row.left = {copy, inner, 1};
  }
  const int64_t panels = divide_up(columns, panel_columns<scalar_t>());
  for_each_block(panels, divide_up(panels, shares),
                 [&](int64_t begin, int64_t end) { run_row<scalar_t>(row, begin, end); });
}

template bool product_serves(const Product<float>& product);
template bool product_serves(const Product<double>& product);
template void Product<float>::run() const;
template void Product<double>::run() const;

}  // namespace torchext::cpu
