// Products of our own: how one is shared out, and what is packed when.
#include "cpu/product.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

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
// Rows or columns of a thread from which on it packs its own panels: there are no other thread's to
// wait for. Forward of 129 x 2048 x 32 takes 0.84 of eager's time so, 1.5 to 1.8 with a panel from
// the other thread, of 250 x 784 x 80 0.95 and 1.13 (2 cores of Zen 4, float32); of 250 x 128 x 128
// 1.02 and 1.2, of 130 x 784 x 784 and 150 x 1024 x 1024 the same (an Intel Xeon of family 6, model
// 207).
constexpr int64_t kOwnShare = 64;
// Steps of an inner dimension up to which threads share out's rows, for they are in each other's
// way where they write halves of one: forward of 500 x 16 x 512 takes 0.72 to 0.87 of eager's time
// by rows and 1.3 to 1.38 by columns, of 500 x 128 x 512 0.84 to 0.9 and 1.0 to 1.2, of 500 x 512 x
// 512 the same (2 cores of Zen 4, float32).
constexpr int64_t kShortInner = 256;
// Steps of an inner dimension up to which threads may share rows (`Product::by_rows`): then each of
// them packs the whole right matrix. With AVX2 the left one is what costs: the weight's gradient of
// 1000 x 128 x 128 takes 1.05 of eager's time by rows and 1.17 by columns, of 2000 x 64 x 64 1.02
// and 1.17 (2 cores of Zen 3, float32).
// Fewer rows a thread are not worth its packing: the weight's gradient of 500 x 2048 x 16
// takes 1.62 of eager's by rows and 1.2 by columns, of 500 x 500 x 32 1.25 and 1.13 (2 cores of an
// Intel Xeon of family 6, model 207).
constexpr int64_t kByRowsInner = 512;
constexpr int64_t kByRowsInnerAvx2 = 4096;
constexpr int64_t kByRowsEach = 32;
// Rows of a thread from which on they are shared where nothing is packed: columns come by whole
// panels, of which one thread may have more. The input's gradient of 100 x 100 x 100 takes 1.05 of
// eager's time by rows and 1.45 by columns, of 64 x 256 x 256 0.91 and 1.1 (2 cores of an Intel
// Xeon of family 6, model 207).
constexpr int64_t kDirectEach = 12;
// Panels from which on the left matrix is packed: for fewer it is read as often where it stands.
// 4096 x 784 by 784 x 64 takes 2.3 ms so, 2.9 packed; by 784 x 224 7.4 and 8.0 (Zen 4, float32).
// AVX2's strips are of half the rows: there it always is (of eager's time on 2 cores of Zen 3,
// forward of 1000 x 128 x 128 1.0 so, 1.15 packed, of 300 x 100 x 500 1.07 and 1.35).
constexpr int64_t kPackLeft = 8;
// The same where all rows of a strip begin in one set of the first cache: by 1024 x 160 7.4 packed,
// 8.3 where it stands.
constexpr int64_t kPackLeftCrowded = 5;
// The same where columns of the left matrix crowd the first cache (`crowds`), and rows from which
// on the right one is packed where its rows do; lines of a set that one of them may take.
constexpr int64_t kPackLeftColumns = 2;
constexpr int64_t kRowsOfPanel = 24;
constexpr int64_t kLinesOfSet = 4;
// Bytes of panels that are packed at once.
constexpr int64_t kPackedBytes = int64_t{4} << 20;
// Bytes between the first and the last row of panels that are read where they stand.
constexpr int64_t kDirectBytes = int64_t{512} << 10;
// Rows and columns up to which the sums between visits of bfloat16 and float16 are kept: 16 MiB.
constexpr int64_t kRowsOfSums = 1024;
constexpr int64_t kColumnsOfSums = 4096;
// Multiplications below which another thread costs more than it saves, on Intel's processors and
// elsewhere: forward of 16 x 100 x 256 takes 8.6 us by two and 15.3 by one, of 2000 x 32 x 8 19 and
// 32 (Zen 4, float32).
constexpr int64_t kGrainIntel = int64_t{1} << 18;
constexpr int64_t kGrain = int64_t{1} << 17;
// Rows up to which, and numbers of a right matrix of contiguous rows from which on, many columns
// are multiplied at a time (product_wide.cpp). The input's gradient of 2 x 784 x 256 takes 15 us so
// and 34 by panels, of 4 x 784 x 256 16 and 22, of 2 x 1024 x 1024 85 and 162; with AVX2 31 and 64,
// 37 and 39, 108 and 243 (2 cores of an Intel Xeon of family 6, model 207, float32).
constexpr int64_t kWideRows = 4;
constexpr int64_t kWideNumbers = int64_t{1} << 15;
// Of a batch of one, where each reads an element from memory.
constexpr int64_t kThinGrain = int64_t{1} << 16;

template <typename scalar_t>
struct Tasks {
  const Product<scalar_t>* product;
  int64_t row_blocks, panel_groups;  // a task is one of both
  int64_t panel_begin, panel_end;    // shared by the groups
  int64_t visit_begin, visit_end;    // of out, one after the other
  acc_type<scalar_t>* packed;        // the panels of one visit, or null
  bool pack_left, pack_right;
  Matrix<acc_type<scalar_t>> sums;  // see ProductBlock
};

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void run_tasks(const Tasks<scalar_t>& tasks, int64_t begin, int64_t end) {
  const Product<scalar_t>& p = *tasks.product;
  const Parts<acc_type<scalar_t>> parts(p.inner);
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
    block.sums = tasks.sums;
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
  const Parts<acc_type<scalar_t>> parts(p.inner);
  const int64_t from = parts.begin_of_visit(tasks.visit_begin);
  const int64_t inner = parts.begin_of_visit(tasks.visit_end) - from;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = (tasks.panel_begin + i) * kPanel;
    pack_panel<Isa, scalar_t>({p.right.at(from, column), p.right.row_stride, p.right.column_stride},
                              inner, std::min<int64_t>(kPanel, p.columns - column),
                              tasks.packed + i * inner * kPanel);
  }
}
TORCHEXT_SIMD_FUNCTION(pack_right, pack_panels, Tasks)

TORCHEXT_SIMD_FUNCTION(run_row, row_panels, RowProduct)
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

bool wide_vectors() { return simd::level() == simd::Level::kAvx512; }

// Panels from which on the left matrix is packed, where nothing crowds.
int64_t pack_left_from() {
  return wide_vectors() ? kPackLeft : std::numeric_limits<int64_t>::max();
}

// Whether the inner steps of one visit, so many numbers apart, begin in few sets of the first
// cache: then what a tile reads of them in place leaves the cache before the next tile reads it.
// Measured with AVX2 alone: weights' gradients of 64 x 512 x 512 take 1.06 to 1.1 of eager's time
// packed, 1.17 in place, of 64 x 128 x 1024 1.03 and 1.17 (2 cores of Zen 3, float32).
template <typename scalar_t>
bool crowds(const Product<scalar_t>& product, int64_t stride) {
  if (wide_vectors()) return false;
  constexpr int64_t kLine = 64, kSets = 64;
  const int64_t bytes = stride * int64_t{sizeof(scalar_t)};
  if (bytes % kLine != 0) return false;
  const int64_t sets = kSets / std::gcd(bytes / kLine, kSets);
  return Parts<acc_type<scalar_t>>(product.inner).longest() > kLinesOfSet * sets;
}

// Blocks of rows times panels that are packed together, by as many threads as there are shares.
template <typename scalar_t>
void run_packed(Tasks<scalar_t> tasks, int64_t shares) {
  using acc_t = acc_type<scalar_t>;
  const Product<scalar_t>& p = *tasks.product;
  const Parts<acc_t> parts(p.inner);
  const int64_t panel_begin = tasks.panel_begin, panel_end = tasks.panel_end;
  const int64_t panels = panel_end - panel_begin, wide = panel_columns<scalar_t>();
  const int64_t at_once =
      std::max<int64_t>(1, kPackedBytes / (parts.longest() * wide * int64_t{sizeof(acc_t)}));
  tasks.packed = scratch<acc_t>(2, std::min(panels, at_once) * parts.longest() * wide);
  const bool crowded = p.left.row_stride * int64_t{sizeof(scalar_t)} % kCrowdedBytes == 0;
  tasks.pack_left = panels >= (crowds(p, p.left.column_stride) ? kPackLeftColumns
                               : crowded                       ? kPackLeftCrowded
                                                               : pack_left_from());
  tasks.row_blocks = divide_up(p.rows, kBlockRows);
  for (int64_t first = panel_begin; first < panel_end; first += at_once) {
    tasks.panel_begin = first;
    tasks.panel_end = std::min(panel_end, first + at_once);
    const int64_t here = tasks.panel_end - first;
    // Few tasks: as many for each thread.
    int64_t groups = divide_up(4 * shares, tasks.row_blocks);
    if (tasks.row_blocks * groups < 16 * shares && tasks.row_blocks % shares != 0) {
      groups = divide_up(groups, shares) * shares;
    }
    tasks.panel_groups = shares == 1 ? 1 : std::clamp<int64_t>(groups, 1, here);
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

}  // namespace

template <typename scalar_t>
void Product<scalar_t>::run() const {
  using acc_t = acc_type<scalar_t>;
  constexpr bool kNarrow = !std::is_same_v<scalar_t, acc_t>;
  if (rows == 0 || columns == 0) return;
  const bool dots = dots_serve(*this);
  if constexpr (std::is_same_v<scalar_t, simd::BFloat16>) {
    if (!dots && pairs_serve(*this)) return run_as_pairs();
  }
  if (better_turned()) return run_turned();
  if (dots) return run_dots();
  const Parts<acc_t> parts(inner);
  const bool keeps_sums = kNarrow && parts.visits > 1;
  if (keeps_sums && (rows > kRowsOfSums || columns > kColumnsOfSums)) return run_in_pieces();
  const int64_t wide = panel_columns<scalar_t>();
  const int64_t panels = divide_up(columns, wide);
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t grain = is_intel() ? kGrainIntel : kGrain;
  const int64_t shares = std::clamp<int64_t>(rows * inner * columns / grain, 1, threads);
  if (has_few_rows()) return run_few_rows();
  if (rows > 1 && rows <= kWideRows && inner > 1 && right.column_stride == 1 &&
      inner * columns >= kWideNumbers && panels > 1) {
    return run_wide(wide);
  }
  if (rows == 1 || (inner == 1 && right.column_stride == 1)) {
    const int64_t each = right.column_stride == 1 ? kThinGrain : turned_grain();
    return run_thin(std::clamp<int64_t>(rows * inner * columns / each, 1, threads));
  }
  const bool direct =
      !kNarrow && right.column_stride == 1 &&
      (rows < kRowsOfPanel || !crowds(*this, right.row_stride)) &&
      parts.longest() * right.row_stride * int64_t{sizeof(scalar_t)} <= kDirectBytes;
  Tasks<scalar_t> tasks{this, 1, 1, 0, panels, 0, parts.visits, nullptr, false, !direct, {}};
  std::vector<acc_t> sums(keeps_sums ? rows * panels * wide : 0);
  tasks.sums = {keeps_sums ? sums.data() : nullptr, panels * wide, 1};
  if (rows <= kFewRows) {
    const int64_t each = rows / shares;
    const bool shares_rows = by_rows && each >= kByRowsEach &&
                             inner <= (wide_vectors() ? kByRowsInner : kByRowsInnerAvx2);
    if (shares_rows || (direct && each >= kDirectEach)) {
      tasks.row_blocks = shares;
    } else {
      tasks.panel_groups = std::min(panels, shares);
      tasks.row_blocks = divide_up(shares, tasks.panel_groups);
    }
    tasks.pack_left = panels / tasks.panel_groups >=
                      (crowds(*this, left.column_stride) ? kPackLeftColumns : pack_left_from());
    const int64_t count = tasks.row_blocks * tasks.panel_groups;
    for_each_block(count, divide_up(count, shares),
                   [&](int64_t begin, int64_t end) { run_product<scalar_t>(tasks, begin, end); });
    return;
  }
  // Where every thread has enough of its own, it packs for itself: what another one has packed
  // comes from that core's cache. Of the two matrices all threads read the smaller one, but for
  // `by_rows` and where most of the time is out's.
  const bool rows_shared =
      rows > columns || ((by_rows || inner <= kShortInner) && rows / shares >= kOwnShare);
  const int64_t of_a_share = rows_shared ? rows / shares : panels / shares * wide;
  if (shares == 1 || of_a_share < kOwnShare) return run_packed(tasks, shares);
  for_each_block(shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Product part = *this;
      Tasks<scalar_t> own = tasks;
      own.product = &part;
      if (rows_shared) {
        const int64_t first = share(rows, shares, i);
        part.rows = share(rows, shares, i + 1) - first;
        part.out.data = out.at(first, 0);
        part.left.data = left.at(first, 0);
        if (keeps_sums) own.sums.data = tasks.sums.at(first, 0);
        run_packed(own, 1);
      } else {
        own.panel_begin = share(panels, shares, i);
        own.panel_end = share(panels, shares, i + 1);
        run_packed(own, 1);
      }
    }
  });
}

// Whether a product of one column is to be one of one row. Not by the rows alone: where dot
// products serve one of the two, of few rows and of many it must be that one.
template <typename scalar_t>
bool Product<scalar_t>::better_turned() const {
  if (columns != 1 || out.row_stride != 1 || inner == 1) return false;
  Product turned = *this;
  std::swap(turned.left, turned.right);
  std::swap(turned.right.row_stride, turned.right.column_stride);
  const bool dots = dots_serve(*this), turned_dots = dots_serve(turned);
  if (dots != turned_dots) return turned_dots;
  return rows > 1;
}

// One of a single column, as that of a single row: out lies in memory as it would.
template <typename scalar_t>
void Product<scalar_t>::run_turned() const {
  Product turned = *this;
  turned.out.row_stride = rows;
  turned.left = {right.data, right.column_stride, right.row_stride};
  turned.right = {left.data, left.column_stride, left.row_stride};
  turned.rows = 1;
  turned.columns = rows;
  const std::vector<scalar_t> biases(bias ? rows : 0, bias ? *bias : scalar_t{});
  if (bias) turned.bias = biases.data();
  // As `better_turned` asked, of one column: of as many as there are rows they might not serve.
  Product asked = turned;
  std::swap(asked.rows, asked.columns);
  if (dots_serve(asked)) return turned.run_dots();
  turned.run();
}

// One whose sums between visits would be too large.
template <typename scalar_t>
void Product<scalar_t>::run_in_pieces() const {
  Product part = *this;
  for (int64_t row = 0; row < rows; row += kRowsOfSums) {
    part.rows = std::min(kRowsOfSums, rows - row);
    part.left.data = left.at(row, 0);
    for (int64_t column = 0; column < columns; column += kColumnsOfSums) {
      part.columns = std::min(kColumnsOfSums, columns - column);
      part.right.data = right.at(0, column);
      part.out.data = out.at(row, column);
      if (bias) part.bias = bias + column;
      part.run();
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
  const RowProduct<scalar_t> row = row_product(*this);
  const int64_t panels = divide_up(columns, panel_columns<scalar_t>());
  for_each_block(panels, divide_up(panels, shares),
                 [&](int64_t begin, int64_t end) { run_row<scalar_t>(row, begin, end); });
}

template void Product<float>::run() const;
template void Product<double>::run() const;
template void Product<simd::BFloat16>::run() const;
template void Product<simd::Half>::run() const;

}  // namespace torchext::cpu
