// The blocks of product_pairs.cpp: two inner steps of bfloat16 side by side are one number of 32
// bits, a pair; panels of the right matrix and strips of the left one are packed as pairs, and a
// tile of both sums them in float32 registers.
#pragma once

#include "cpu/product_kernel.h"

namespace torchext::cpu {

using simd::BFloat16;

// Pairs between two visits of out (see kPartsOf): a packed strip and panel stay in the second
// cache.
inline constexpr int64_t kPairsOfVisit = 1024;

// A strip times a panel, into the first `columns` columns of out's rows.
struct PairTile {
  Matrix<const float> strip;  // pairs, by their bits
  const float* panel;
  int64_t pairs;
  Matrix<BFloat16> out;
  // What visits before the last one leave for the next: as out, in float32; null for a single one.
  Matrix<float> sums;
  int64_t columns;
  bool first, last;  // visit
  const BFloat16* bias;
  bool relu;
};

// sum + a.low * b.low + a.high * b.high, of pairs of bfloat16 and float32 sums. Assembly, as the
// compiler's name for it wants a type that GCC and Clang changed between versions.
template <typename Value, typename Pairs>
TORCHEXT_INLINE Value add_products(Value sum, Pairs a, Pairs b) {
#if defined(__x86_64__)
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#endif
  return sum;
}

// Both vectors' values as bfloat16, one after the other.
template <typename Value>
TORCHEXT_INLINE auto rounded_pair(Value low, Value high) {
  simd::Vector<uint16_t, sizeof(Value) / 2> result{};
#if defined(__x86_64__)
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(result) : "v"(low), "v"(high));
#endif
  return result;
}

// kUnit: the strip's rows are one pair apart. kVectors: of the panel's two, those that columns of
// out stand in.
template <int kRows, bool kUnit, int kVectors>
TORCHEXT_INLINE void pair_tile(const PairTile& tile) {
  constexpr int kLanes = simd::kLanesOf<simd::Avx512, BFloat16>;
  using Value = simd::Vector<float, kLanes>;
  using Pairs = simd::Vector<uint32_t, kLanes>;
  Value sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    for (int part = 0; part < kVectors; ++part) sum[i][part] = Value{};
  }
  const float *x = tile.strip.data, *y = tile.panel;
  const int64_t step = kUnit ? 1 : tile.strip.row_stride;
  const int64_t x_step = kUnit ? kRows : 1;
  for (int64_t k = tile.pairs; k > 0; --k, x += x_step, y += 2 * kLanes) {
    Pairs vectors[kVectors];
#pragma GCC unroll 2
    for (int part = 0; part < kVectors; ++part) {
      vectors[part] = simd::bits_as<Pairs>(simd::load<kLanes>(y + part * kLanes));
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto row = simd::broadcast<Value>((x + i / 4 * 4 * step) + i % 4 * step);
      const auto pairs = simd::bits_as<Pairs>(row);
#pragma GCC unroll 2
      for (int part = 0; part < kVectors; ++part) {
        sum[i][part] = add_products(sum[i][part], pairs, vectors[part]);
      }
    }
  }
  // One condition for the whole tile at a time: where the inner dimension is short, they count.
  const int64_t columns = tile.columns;
  const auto for_each_sum = [&](auto body) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int part = 0; part < kVectors; ++part) body(sum[i][part], i, part);
    }
  };
  // A row of sums is whole panels long.
  if (!tile.first) {
    for_each_sum([&](Value& value, int i, int part) __attribute__((always_inline)) {
      value += simd::load<kLanes>(tile.sums.at(i, part * kLanes));
    });
  }
  if (!tile.last) {
    for_each_sum([&](Value& value, int i, int part) __attribute__((always_inline)) {
      simd::store<kLanes>(tile.sums.at(i, part * kLanes), value);
    });
    return;
  }
  if (tile.bias) {
    Value bias[kVectors];
#pragma GCC unroll 2
    for (int part = 0; part < kVectors; ++part) {
      const int64_t count = columns - part * kLanes;
      const BFloat16* from = tile.bias + part * kLanes;
      bias[part] = count < kLanes ? simd::load_tail<kLanes>(from, count, 0)  //
                                  : simd::load<kLanes>(from);
    }
    for_each_sum([&](Value& value, int, int part)
                     __attribute__((always_inline)) { value += bias[part]; });
  }
  if (tile.relu) {
    for_each_sum([&](Value& value, int, int) __attribute__((always_inline)) {
      value = value <= 0 ? Value{} : value;  // NaN stays NaN
    });
  }
  BFloat16* to = tile.out.data;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i, to += tile.out.row_stride) {
    const auto rounded = rounded_pair(sum[i][0], kVectors == 2 ? sum[i][kVectors - 1] : Value{});
    if (kVectors == 2 && columns == 2 * kLanes) {
      simd::store_raw(to, rounded);
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        to[j] = std::bit_cast<BFloat16>(static_cast<uint16_t>(rounded[j]));
      }
    }
  }
}

// A tile is a function of its own, as in product_kernel.h.
template <int kRows, bool kUnit, int kVectors>
struct PairTileOf {
#if defined(__x86_64__)
  [[gnu::target("arch=x86-64-v4")]]
#endif
  [[gnu::noinline]] static void
  run(const PairTile& tile) {
    pair_tile<kRows, kUnit, kVectors>(tile);
  }
};

template <bool kUnit, int kVectors, int... kIndex>
TORCHEXT_INLINE void run_pair_tile(const PairTile& tile, int64_t rows,
                                   std::integer_sequence<int, kIndex...>) {
  static constexpr void (*kTiles[])(const PairTile&) = {
      PairTileOf<kIndex + 1, kUnit, kVectors>::run...};
  kTiles[rows - 1](tile);
}

template <bool kUnit>
TORCHEXT_INLINE void run_pair_tile(const PairTile& tile, int64_t rows) {
  constexpr auto kHeights = std::make_integer_sequence<int, kStripOf<simd::Avx512>>{};
  if (tile.columns > simd::kLanesOf<simd::Avx512, BFloat16>) {
    run_pair_tile<kUnit, 2>(tile, rows, kHeights);
  } else {
    run_pair_tile<kUnit, 1>(tile, rows, kHeights);
  }
}

// Whether `inner` steps along one side of a matrix can be packed: they are contiguous and can be
// read two at a time, or what lies across is contiguous.
inline bool packs_pairs(int64_t inner, int64_t stride, int64_t across_stride) {
  return (stride == 1 && inner % 2 == 0 && across_stride % 2 == 0) || across_stride == 1;
}

// Two rows' numbers at the same place as pairs; `high` may be null: zeros.
template <int kLanes>
TORCHEXT_INLINE void store_pairs(const BFloat16* low, const BFloat16* high, float* to) {
  using Wide = simd::Vector<uint32_t, kLanes>;
  const auto bits = [](const BFloat16* from) __attribute__((always_inline)) {
    const auto narrow = simd::load_raw<uint16_t, kLanes>(reinterpret_cast<const uint16_t*>(from));
    return __builtin_convertvector(narrow, Wide);
  };
  Wide pairs = bits(low);
  if (high) pairs |= bits(high) << 16;
  simd::store_raw(to, pairs);
}

// Copies `count` rows or columns of a matrix, element (k, i) at from.data[k * row_stride + i *
// column_stride] for inner step k, to pairs: pair p of i is to[p * to_stride + i].
template <int kLanes>
TORCHEXT_INLINE void pack_pairs(Matrix<const BFloat16> from, int64_t inner, int64_t count,
                                float* to, int64_t to_stride) {
  if (from.column_stride != 1) {  // row_stride 1: pairs as they stand, of i one after another
    const Matrix<const float> pairs{reinterpret_cast<const float*>(from.data),
                                    from.column_stride / 2, 1};
    return copy_transposed<kLanes>(pairs, count, inner / 2, to, to_stride);
  }
  for (int64_t k = 0; k < inner; k += 2, to += to_stride) {
    const BFloat16* low = from.at(k, 0);
    const BFloat16* high = k + 1 < inner ? from.at(k + 1, 0) : nullptr;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store_pairs<kLanes>(low + i, high ? high + i : nullptr, to + i);
    }
    for (; i < count; ++i) store_pairs<1>(low + i, high ? high + i : nullptr, to + i);
  }
}

}  // namespace torchext::cpu
