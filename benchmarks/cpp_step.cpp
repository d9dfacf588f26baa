// A step of the C++ trainer as an operator: so it takes turns with the other ways to train in one
// process, on the same batches. training_jobs.py builds and loads it.
#define TORCHEXT_DIGITS ""  // the batches come from Python

#include <torch/library.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "trainer.h"

namespace {

std::vector<std::unique_ptr<Trainer>>& trainers() {
  static std::vector<std::unique_ptr<Trainer>> all;
  return all;
}

// Returns the number by which `step` knows the trainer.
int64_t make(const std::string& model, double lr, double momentum, int64_t seed) {
  const data::Idx images{{1, 28, 28}, data::Bytes(kPixels)}, labels{{1}, data::Bytes(1)};
  const Trainer::Options options{model, 1, lr, momentum, seed, at::kCPU};
  trainers().push_back(
      std::make_unique<Trainer>(data::Digits{images, labels, images, labels}, options));
  return static_cast<int64_t>(trainers().size()) - 1;
}

at::Tensor step(int64_t trainer, const at::Tensor& images, const at::Tensor& labels) {
  return trainers().at(trainer)->step(images, labels);
}

}  // namespace

TORCH_LIBRARY(torchext_benchmarks, m) {
  m.def("make(str model, float lr, float momentum, int seed) -> int", make);
  m.def("step(int trainer, Tensor images, Tensor labels) -> Tensor", step);
}
