// How kernels walk the logits, and how a gradient is laid out after them: shared by every device,
// and repeated for fake tensors in torchext/ops/cross_entropy_fake.py.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "ops/cross_entropy.h"

namespace torchext {

// How the kernels walk a tensor: rows of contiguous classes, or tiles of positions. Rows of few
// classes fill no vector, so that their positions stand side by side in one, too.
enum class Walk { kRows, kFewClasses, kTiles, kTransposed };

// `few_classes`: up to so many classes rows are walked as kFewClasses.
inline std::optional<Walk> walk_of(const std::optional<Strides>& strides,
                                   const CrossEntropyShape& shape, int64_t few_classes) {
  if (!strides) return std::nullopt;
  if (shape.positions() == 0) return Walk::kRows;  // nothing to walk
  if (strides->channel == 1 || shape.classes == 1) {
    return shape.classes <= few_classes ? Walk::kFewClasses : Walk::kRows;
  }
  if (shape.inner > 1) {
    if (strides->inner == 1) return Walk::kTiles;
  } else if (strides->outer == 1) {
    return Walk::kTransposed;  // (C, N) in memory: the N positions take the part of S
  }
  return std::nullopt;
}

// The strides of a dense tensor of `sizes` that is walked so.
inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, Walk walk) {
  std::vector<int64_t> strides = contiguous_strides(sizes);
  if (walk == Walk::kTransposed) {
    std::fill(strides.begin(), strides.end(), sizes[0] * sizes[1]);
    strides[0] = 1;
    strides[1] = sizes[0];
  }
  if ((walk == Walk::kRows || walk == Walk::kFewClasses) && sizes.size() > 2) {
    strides[1] = 1;  // channels last: (N, S, C) in memory
    int64_t stride = sizes[1];
    for (size_t i = sizes.size() - 1; i >= 2; --i) {
      strides[i] = stride;
      stride *= sizes[i];
    }
    strides[0] = stride;
  }
  return strides;
}

}  // namespace torchext
