// What `train` trains: the network, its loss and optimiser, and the batches. The rules by which
// every trainer of this project sees the same numbers stand in torchext/data/batches.py.
#pragma once

#include <torch/torch.h>
#include <torchext/torchext.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "data.h"

constexpr int64_t kPixels = 784;
constexpr int64_t kHidden = 64;

// One row an image, from 0 to 1.  (N, height * width)
inline at::Tensor as_input(const data::Idx& images, at::Device device) {
  const auto count = static_cast<int64_t>(images.sizes[0]);
  const auto pixels = static_cast<int64_t>(images.values.size()) / count;
  const at::Tensor bytes =
      torch::from_blob(const_cast<uint8_t*>(images.values.data()), {count, pixels}, at::kByte);
  return bytes.to(device).to(at::kFloat).div_(255);
}

inline at::Tensor as_target(const data::Idx& labels, at::Device device) {
  const auto count = static_cast<int64_t>(labels.sizes[0]);
  return torch::from_blob(const_cast<uint8_t*>(labels.values.data()), {count}, at::kByte)
      .to(device, at::kLong);
}

// 784-64-10. Both models have the same parameters under the same names, and the same start.
inline torch::nn::Sequential make_network(const std::string& model) {
  torch::nn::Sequential network;
  if (model == "fused") {
    network->push_back("hidden", torchext::nn::LinearReLU(kPixels, kHidden));
  } else {
    network->push_back("hidden", torch::nn::Linear(kPixels, kHidden));
    network->push_back("relu", torch::nn::ReLU());
  }
  network->push_back("output", torch::nn::Linear(kHidden, data::kClasses));
  return network;
}

inline torch::nn::AnyModule make_loss(const std::string& model) {
  if (model == "fused") return torch::nn::AnyModule(torchext::nn::CrossEntropyLoss());
  return torch::nn::AnyModule(torch::nn::CrossEntropyLoss());
}

// SGD with momentum, all parameters in one call and each in one pass: torch::optim::SGD, with the
// same arithmetic, makes four passes in as many calls for each.
class Sgd {
 public:
  Sgd(std::vector<at::Tensor> parameters, double lr, double momentum)
      : parameters_(std::move(parameters)), lr_(lr), momentum_(momentum) {
    if (momentum == 0) return;
    for (const at::Tensor& parameter : parameters_) velocity_.push_back(at::zeros_like(parameter));
  }

  void zero_grad() {
    for (at::Tensor& parameter : parameters_) parameter.mutable_grad().reset();
  }

  void step() {
    const at::NoGradGuard no_grad;
    gradients_.clear();
    for (const at::Tensor& parameter : parameters_) gradients_.push_back(parameter.grad());
    at::_fused_sgd_(parameters_, gradients_, velocity_, /*weight_decay=*/0, momentum_, lr_,
                    /*dampening=*/0, /*nesterov=*/false, /*maximize=*/false,
                    /*is_first_step=*/false);
    gradients_.clear();  // backward moves a gradient into place that nobody else holds
  }

 private:
  std::vector<at::Tensor> parameters_, velocity_, gradients_;
  double lr_, momentum_;
};

class Trainer {
 public:
  struct Options {
    std::string model;  // "fused" or "stock"
    int64_t batch_size;
    double lr;
    double momentum;
    int64_t seed;
    at::Device device;
  };

  Trainer(const data::Digits& digits, const Options& options)
      : network(start(options)),
        options_(options),
        loss_(make_loss(options.model)),
        optimizer_(network->parameters(), options.lr, options.momentum),
        images_(as_input(digits.train_images, options.device)),
        labels_(as_target(digits.train_labels, options.device)),
        shuffled_images_(at::empty_like(images_)),
        test_images_(as_input(digits.test_images, options.device)),
        test_labels_(as_target(digits.test_labels, options.device)) {}

  int64_t samples() const { return images_.size(0); }
  int64_t steps() const { return (samples() + options_.batch_size - 1) / options_.batch_size; }

  // Trains for an epoch, counted from 1, and returns the mean loss of a sample. Calls after_step()
  // after each step; if that says false, the epoch ends there.
  template <typename Function>
  double train_epoch(int64_t epoch, const Function& after_step) {
    shuffle(epoch);
    std::vector<at::Tensor> losses;
    for (int64_t begin = 0; begin < samples(); begin += options_.batch_size) {
      const int64_t size = std::min(options_.batch_size, samples() - begin);
      losses.push_back(
          step(shuffled_images_.narrow(0, begin, size), shuffled_labels_.narrow(0, begin, size)));
      if (!after_step()) break;
    }
    return mean_loss(losses);
  }

  // One step on a batch; returns its mean loss before the step. Not a number: .item() would wait
  // for a GPU in every step.
  at::Tensor step(const at::Tensor& images, const at::Tensor& labels) {
    optimizer_.zero_grad();
    const at::Tensor loss = loss_.forward(network->forward(images), labels);
    loss.backward();
    optimizer_.step();
    return loss.detach();
  }

  // The share of held-out images that get their label, 0 to 1.
  double test_accuracy() {
    const at::NoGradGuard no_grad;
    const int64_t count = test_labels_.size(0), most = 10000;
    int64_t right = 0;
    for (int64_t begin = 0; begin < count; begin += most) {
      const int64_t size = std::min(most, count - begin);
      const at::Tensor found = network->forward(test_images_.narrow(0, begin, size)).argmax(1);
      right += found.eq(test_labels_.narrow(0, begin, size)).sum().item<int64_t>();
    }
    return static_cast<double>(right) / static_cast<double>(count);
  }

  torch::nn::Sequential network;

 private:
  static torch::nn::Sequential start(const Options& options) {
    torch::manual_seed(static_cast<uint64_t>(options.seed));
    torch::nn::Sequential network = make_network(options.model);
    network->to(options.device);
    return network;
  }

  void shuffle(int64_t epoch) {
    const at::Generator generator =
        at::detail::createCPUGenerator(static_cast<uint64_t>(options_.seed + epoch));
    const at::Tensor order = torch::randperm(samples(), generator, at::kLong).to(images_.device());
    at::index_select_out(shuffled_images_, images_, 0, order);
    shuffled_labels_ = labels_.index_select(0, order);
  }

  double mean_loss(const std::vector<at::Tensor>& losses) const {
    const at::Tensor means = at::stack(losses).to(at::kCPU, at::kDouble);
    double total = 0;
    for (int64_t i = 0; i < means.size(0); ++i) {
      const int64_t left = samples() - i * options_.batch_size;
      total += means.const_data_ptr<double>()[i] *
               static_cast<double>(std::min(left, options_.batch_size));
    }
    return total / static_cast<double>(samples());
  }

  Options options_;
  torch::nn::AnyModule loss_;
  Sgd optimizer_;
  at::Tensor images_, labels_;                    // (N, pixels), (N)
  at::Tensor shuffled_images_, shuffled_labels_;  // the same in the order of the epoch
  at::Tensor test_images_, test_labels_;
};
