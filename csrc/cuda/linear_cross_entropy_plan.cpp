// Where linear_cross_entropy puts pieces of logits in the memory of the weight's gradient.
//
// Products fill the gradient from its beginning. So the pieces lie at its end, in order, and each
// is as wide as what is free before it: then the product that is made of it ends where it begins,
// and those after it have not been touched.
//
//   gradient    |  free  | piece 0 |    piece 1    |        piece 2        |
//   products    |   0    |     1     |    2  ...        (each of its piece's classes)
//
// With N rows and H features a class takes N elements as logits and H as gradient. Of r = N / H =
// 2, each piece is twice as wide as the one before: three of them hold 7/15 of the classes.
#include <algorithm>

#include "cuda/linear_cross_entropy.h"
#include "cuda/linear_cross_entropy_call.h"

namespace torchext::cuda {
namespace {

// Where the piece that begins at class `begin` lies, of `inside` classes in the gradient.
int64_t offset_of(int64_t begin, int64_t inside, int64_t rows, int64_t features, int64_t classes) {
  return down(classes * features, kAlign) - rows * (inside - begin);
}

// Where pieces begin so that `inside` classes of logits may lie in the gradient, and end; nothing
// where they may not. A piece may be as large as the gradient's rows before the piece itself.
std::vector<int64_t> pieces_inside(int64_t inside, int64_t rows, int64_t features,
                                   int64_t classes) {
  std::vector<int64_t> begin{0};
  while (begin.back() < inside && begin.size() < kMostPieces) {
    const int64_t room = offset_of(begin.back(), inside, rows, features, classes);
    const int64_t end = std::min(inside, room < 0 ? 0 : down(room / features, kAlign));
    if (end <= begin.back()) break;
    begin.push_back(end);
  }
  return begin.back() == inside ? begin : std::vector<int64_t>();
}

}  // namespace

PiecePlan plan_pieces(int64_t rows, int64_t features, int64_t classes) {
  int64_t possible = 0, impossible = classes / kAlign + 1;  // in units of kAlign
  while (possible + 1 < impossible) {
    const int64_t middle = (possible + impossible) / 2;
    const bool fits = !pieces_inside(middle * kAlign, rows, features, classes).empty();
    (fits ? possible : impossible) = middle;
  }
  PiecePlan plan{pieces_inside(possible * kAlign, rows, features, classes),
                 classes - possible * kAlign};
  if (plan.outside > 0) plan.begin.push_back(classes);
  return plan;
}

int64_t piece_offset(const PiecePlan& plan, int64_t rows, int64_t features, size_t piece) {
  const int64_t classes = plan.begin.back();
  return offset_of(plan.begin[piece], classes - plan.outside, rows, features, classes);
}

}  // namespace torchext::cuda
