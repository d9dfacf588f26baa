// Products in bfloat16 by the instruction for pairs of them (AVX512_BF16), with bias and ReLU.
#include "cpu/product_pairs.h"

#include <algorithm>

#include "cpu/dispatch.h"

namespace torchext::cpu {
namespace {

constexpr int kPanel = kPanelOf<simd::Avx512, BFloat16>;
constexpr int kStrip = kStripOf<simd::Avx512>;
constexpr int kLanes = kPanel / 2;
// Rows up to which a thread packs its own panels of the right matrix. What another thread has
// packed comes from that core's cache, and a virtual machine's cores may be far apart: 64 x 4096 by
// 4096 x 784 took 1.5 or 2.6 ms by the hour, with its own panels 1.5 and 1.7 (2 cores of Zen 4).
constexpr int64_t kFewRows = 256;
// The same where the sums are long and every thread has many panels, so that packing the left
// matrix once a thread costs little.
constexpr int64_t kFewRowsOfLongSums = 1024;
constexpr int64_t kLongSum = 512;
// What bounds the sums between visits: 4096 rows times the panels of kPackedBytes, or 1024 rows
// times these panels, 16 MiB each.
constexpr int64_t kRowsOfSums = 4096;
constexpr int64_t kPanelsOfSums = 128;
// Gradients of weights over no more rows and with no less of out (16 MiB) stay with the library:
// they are page faults. Not what a batch's rows give, which would depend on how many they are.
constexpr int64_t kShortSum = 64;
constexpr int64_t kLargeOut = int64_t{1} << 23;
// Panels that a thread packs for itself at once, and inner steps of contiguous rows that go to all
// of them: memory is read along the rows. 64 x 4096 by 4096 x 4096 7.8 ms, panel by panel 8.4.
constexpr int64_t kPanelsAtOnce = 4;
constexpr int64_t kStepsAtOnce = 16;
// Panels from which on the left matrix is packed: see product.cpp.
constexpr int64_t kPackLeft = 8;
// As in product.cpp.
constexpr int64_t kBlockRows = 96;
constexpr int64_t kPackedBytes = int64_t{4} << 20;
constexpr int64_t kGrain = int64_t{1} << 19;
// What packing costs, in rows: of few it is most of the time. 1 x 784 x 1000 takes 94 us by two
// threads and 168 by one, 1 x 784 x 256 13.6 and 19.3, 2 x 784 x 256 13.9 and 19.9 (Zen 4).
constexpr int64_t kPackedRows = 12;

// What all tasks of one visit share. A task is a block of rows times a group of panels.
template <typename scalar_t>
struct PairTasks {
  const Product<BFloat16>* product;
  int64_t row_blocks, panel_groups;
  int64_t panel_begin, panel_end;
  int64_t pair_begin, pair_end;
  float* packed;  // the panels, or null where each task packs its own
  bool pack_left;
  Matrix<float> sums;  // see PairTile: of all rows, and of the panels
};

// Panels [begin, end) of one visit's inner steps. Where rows are contiguous, a few of them at a
// time go to all panels: memory is read along them.
TORCHEXT_INLINE void pack_panels_of(const PairTasks<float>& tasks, int64_t begin, int64_t end,
                                    float* to) {
  const Product<BFloat16>& p = *tasks.product;
  const int64_t size = (tasks.pair_end - tasks.pair_begin) * kPanel;
  const int64_t from = 2 * tasks.pair_begin, inner = std::min(p.inner, 2 * tasks.pair_end) - from;
  const int64_t at_once = p.right.column_stride == 1 ? kStepsAtOnce : inner;
  for (int64_t k = 0; k < inner; k += at_once) {
    const int64_t steps = std::min(at_once, inner - k);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i * kPanel, count = std::min<int64_t>(kPanel, p.columns - column);
      float* panel = to + (i - begin) * size + k / 2 * kPanel;
      if (count < kPanel) std::fill_n(panel, divide_up(steps, 2) * kPanel, 0.0f);
      pack_pairs<kLanes>({p.right.at(from + k, column), p.right.row_stride, p.right.column_stride},
                         steps, count, panel, kPanel);
    }
  }
}

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void pack_pair_panels(const PairTasks<scalar_t>& tasks, int64_t begin,
                                      int64_t end) {
  const int64_t size = (tasks.pair_end - tasks.pair_begin) * kPanel;
  pack_panels_of(tasks, tasks.panel_begin + begin, tasks.panel_begin + end,
                 tasks.packed + begin * size);
}

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void run_pair_tasks(const PairTasks<scalar_t>& tasks, int64_t begin, int64_t end) {
  const Product<BFloat16>& p = *tasks.product;
  const int64_t pairs = tasks.pair_end - tasks.pair_begin;
  const int64_t inner = std::min(p.inner, 2 * tasks.pair_end) - 2 * tasks.pair_begin;
  const int64_t panels = tasks.panel_end - tasks.panel_begin;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / tasks.panel_groups, group = task % tasks.panel_groups;
    const int64_t row_begin = share(p.rows, tasks.row_blocks, block);
    const int64_t rows = share(p.rows, tasks.row_blocks, block + 1) - row_begin;
    const int64_t strips = divide_up(rows, kStrip);
    float* packed_left = tasks.pack_left ? scratch<float>(0, rows * pairs) : nullptr;
    // As the panels: along the rows of what is contiguous across.
    const int64_t at_once = p.left.column_stride == 1 ? inner : kStepsAtOnce;
    for (int64_t k = 0; packed_left && k < inner; k += at_once) {
      for (int64_t s = 0; s < strips; ++s) {
        const auto [first, last] = strip_rows(rows, strips, s);
        pack_pairs<4>({p.left.at(row_begin + first, 2 * tasks.pair_begin + k), p.left.column_stride,
                       p.left.row_stride},
                      std::min(at_once, inner - k), last - first,
                      packed_left + first * pairs + k / 2 * (last - first), last - first);
      }
    }
    const int64_t panel_begin = tasks.panel_begin + share(panels, tasks.panel_groups, group);
    const int64_t panel_end = tasks.panel_begin + share(panels, tasks.panel_groups, group + 1);
    PairTile tile{};
    tile.pairs = pairs;
    tile.first = tasks.pair_begin == 0;
    tile.last = 2 * tasks.pair_end >= p.inner;
    tile.relu = p.relu;
    const auto run_tile = [&](int64_t panel, const float* packed, int64_t first, int64_t last) {
      const int64_t row = row_begin + first, column = panel * kPanel;
      tile.panel = packed;
      tile.columns = std::min<int64_t>(kPanel, p.columns - column);
      tile.bias = p.bias ? p.bias + column : nullptr;
      tile.out = {p.out.at(row, column), p.out.row_stride, 1};
      if (tasks.sums.data) {
        const int64_t here = column - tasks.panel_begin * kPanel;
        tile.sums = {tasks.sums.at(row, here), tasks.sums.row_stride, 1};
      }
      if (packed_left) {
        tile.strip = {packed_left + first * pairs, 1, last - first};
        run_pair_tile<true>(tile, last - first);
      } else {
        const BFloat16* from = p.left.at(row, 2 * tasks.pair_begin);
        tile.strip = {reinterpret_cast<const float*>(from), p.left.row_stride / 2, 1};
        run_pair_tile<false>(tile, last - first);
      }
    };
    // Panels [from, to), packed one after the other. Short sums go along the rows: with them it is
    // the writing that counts.
    const auto run_panels = [&](int64_t from, int64_t to, const float* packed) {
      if ((to - from) * pairs * kPanel * int64_t{sizeof(float)} > kCachedPanels) {
        for (int64_t panel = from; panel < to; ++panel, packed += pairs * kPanel) {
          for (int64_t s = 0; s < strips; ++s) {
            const auto [first, last] = strip_rows(rows, strips, s);
            run_tile(panel, packed, first, last);
          }
        }
        return;
      }
      for (int64_t s = 0; s < strips; ++s) {
        const auto [first, last] = strip_rows(rows, strips, s);
        for (int64_t panel = from; panel < to; ++panel) {
          run_tile(panel, packed + (panel - from) * pairs * kPanel, first, last);
        }
      }
    };
    if (tasks.packed) {
      run_panels(panel_begin, panel_end,
                 tasks.packed + (panel_begin - tasks.panel_begin) * pairs * kPanel);
      continue;
    }
    float* own = scratch<float>(1, kPanelsAtOnce * pairs * kPanel);
    for (int64_t panel = panel_begin; panel < panel_end; panel += kPanelsAtOnce) {
      const int64_t last = std::min(panel_end, panel + kPanelsAtOnce);
      pack_panels_of(tasks, panel, last, own);
      run_panels(panel, last, own);
    }
  }
}

TORCHEXT_SIMD_FUNCTION(pack_right_pairs, pack_pair_panels, PairTasks)
TORCHEXT_SIMD_FUNCTION(run_pairs, run_pair_tasks, PairTasks)

}  // namespace

// Measured on Zen 4 (2 cores), forward and backward of linear_relu against the bare products of
// oneDNN: 1024 x 1024 x 1024 1.03 (1.06 by oneDNN's products), 4096 x 784 x 64 1.00 (1.09). Not on
// Intel's, whose library has matrices in hardware (AMX).
bool multiplies_pairs() {
#if defined(__x86_64__)
  static const bool here = simd::level() == simd::Level::kAvx512 &&
                           __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel");
  return here;
#else
  return false;
#endif
}

bool pairs_serve(const Product<BFloat16>& product) {
  const bool faults = product.left.column_stride != 1 && product.inner <= kShortSum &&
                      product.rows * product.columns >= kLargeOut;
  return product.by_pairs && multiplies_pairs() && !product.accumulate && !faults &&
         packs_pairs(product.inner, product.left.column_stride, product.left.row_stride) &&
         packs_pairs(product.inner, product.right.row_stride, product.right.column_stride);
}

template <>
void Product<BFloat16>::run_as_pairs() const {
  const int64_t panels = divide_up(columns, kPanel), pairs = divide_up(inner, 2);
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t shares =
      std::clamp<int64_t>((rows + kPackedRows) * inner * columns / kGrain, 1, threads);
  const int64_t visits = std::max<int64_t>(1, divide_up(pairs, kPairsOfVisit));
  const int64_t longest = divide_up(pairs, visits);
  if (visits > 1 && rows > kRowsOfSums) {
    for (int64_t begin = 0; begin < rows; begin += kRowsOfSums) {
      Product part = *this;
      part.out.data = out.at(begin, 0);
      part.left.data = left.at(begin, 0);
      part.rows = std::min(kRowsOfSums, rows - begin);
      part.run_as_pairs();
    }
    return;
  }
  int64_t at_once = std::clamp<int64_t>(
      kPackedBytes / std::max<int64_t>(1, longest * kPanel * int64_t{sizeof(float)}), 1, panels);
  PairTasks<float> tasks{};
  tasks.product = this;
  const bool in_place = left.column_stride == 1 && inner % 2 == 0 && left.row_stride % 2 == 0;
  const int64_t few =
      inner >= kLongSum && panels >= kPackLeft * shares ? kFewRowsOfLongSums : kFewRows;
  if (rows <= few) {
    at_once = visits > 1 ? std::min(panels, std::max(kPanelsOfSums, kPackLeft * shares)) : panels;
    tasks.panel_groups = std::min(panels, shares);
    tasks.row_blocks = std::min(rows, divide_up(shares, tasks.panel_groups));
  } else {
    tasks.packed = scratch<float>(2, at_once * longest * kPanel);
    tasks.panel_groups = 1;
    tasks.row_blocks = std::min(rows, divide_up(divide_up(rows, kBlockRows), shares) * shares);
  }
  std::vector<float> sums(visits > 1 ? rows * at_once * kPanel : 0);
  if (visits > 1) tasks.sums = {sums.data(), at_once * kPanel, 1};
  tasks.pack_left = !in_place || panels / tasks.panel_groups >= kPackLeft;
  const int64_t count = tasks.row_blocks * tasks.panel_groups;
  for (int64_t first = 0; first < panels; first += at_once) {
    tasks.panel_begin = first;
    tasks.panel_end = std::min(panels, first + at_once);
    const int64_t here = tasks.panel_end - first;
    for (int64_t visit = 0; visit < visits; ++visit) {
      tasks.pair_begin = share(pairs, visits, visit);
      tasks.pair_end = share(pairs, visits, visit + 1);
      if (tasks.packed) {
        for_each_block(here, divide_up(here, shares), [&](int64_t begin, int64_t end) {
          pack_right_pairs<float>(tasks, begin, end);
        });
      }
      for_each_block(count, divide_up(count, shares),
                     [&](int64_t begin, int64_t end) { run_pairs<float>(tasks, begin, end); });
    }
  }
}

}  // namespace torchext::cpu
