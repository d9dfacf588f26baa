// What `train` trains: the network, its loss and optimiser, and the batches. The rules by which
// every trainer of this project sees the same numbers stand in torchext/data/batches.py.
#pragma once

#include <torch/torch.h>
#include <torchext/torchext.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "data.h"

constexpr int64_t kPixels = 784;
constexpr int64_t kHidden = 64;

// 784-64-10. Both kinds have the same parameters under the same names, and the same start.
class Network : public torch::nn::Module {
 public:
  explicit Network(const std::string& model) {
    if (model == "fused") {
      fused_ = register_module("hidden", torchext::nn::LinearReLU(kPixels, kHidden));
    } else {
      stock_ = register_module("hidden", torch::nn::Linear(kPixels, kHidden));
    }
    output_ = register_module("output", torch::nn::Linear(kHidden, data::kClasses));
  }

  // (N, pixels) to (N, classes)
  at::Tensor forward(const at::Tensor& images) { return output_(hidden(images)); }

  // The mean loss of a batch. The last layer and the loss are one op where they can be.
  at::Tensor loss(const at::Tensor& images, const at::Tensor& labels) {
    if (fused_.is_empty()) {
      return torch::nn::functional::cross_entropy(forward(images), labels);
    }
    return torchext::linear_cross_entropy(hidden(images), output_->weight, labels, output_->bias);
  }

 private:
  at::Tensor hidden(const at::Tensor& images) {
    return fused_.is_empty() ? at::relu(stock_(images)) : fused_(images);
  }

  torchext::nn::LinearReLU fused_{nullptr};
  torch::nn::Linear stock_{nullptr}, output_{nullptr};
};

inline at::Tensor as_bytes(const data::Idx& idx, at::Device device) {
  const auto count = static_cast<int64_t>(idx.sizes[0]);
  const auto each = static_cast<int64_t>(idx.values.size()) / count;
  return torch::from_blob(const_cast<uint8_t*>(idx.values.data()), {count, each}, at::kByte)
      .to(device, at::kByte, /*non_blocking=*/false, /*copy=*/true);
}

// The training set, shuffled anew in each epoch and cut into batches. The images stay bytes, and
// become the network's input, from 0 to 1, for a few batches at a time: those fit into the cache.
class Batches {
 public:
  Batches(const data::Idx& images, const data::Idx& labels, int64_t batch_size, int64_t seed,
          at::Device device)
      : images_(as_bytes(images, device)),
        labels_(as_bytes(labels, device).squeeze(1).to(at::kLong)),
        batch_size_(batch_size),
        seed_(seed),
        input_(at::empty({std::min(samples(), kAhead * batch_size), images_.size(1)},
                         images_.options().dtype(at::kFloat))) {}

  int64_t samples() const { return images_.size(0); }
  int64_t steps() const { return (samples() + batch_size_ - 1) / batch_size_; }

  // Calls function(images, labels) with each batch of an epoch, counted from 1. If that says false,
  // the epoch ends there.  float (B, pixels), int64 (B)
  template <typename Function>
  void epoch(int64_t number, const Function& function) {
    const auto generator = at::detail::createCPUGenerator(static_cast<uint64_t>(seed_ + number));
    const at::Tensor order = torch::randperm(samples(), generator, at::kLong).to(images_.device());
    for (const at::Tensor& places : order.split(input_.size(0))) {
      const at::Tensor input = input_.narrow(0, 0, places.size(0));
      input.copy_(images_.index_select(0, places)).div_(255);
      const auto images = input.split(batch_size_);
      const auto labels = labels_.index_select(0, places).split(batch_size_);
      for (size_t i = 0; i < images.size(); ++i) {
        if (!function(images[i], labels[i])) return;
      }
    }
  }

  // The mean loss of a sample, from the mean loss of each batch.
  double mean_loss(const std::vector<at::Tensor>& losses) const {
    const at::Tensor means = at::stack(losses).to(at::kCPU, at::kDouble);
    double total = 0;
    for (int64_t i = 0; i < means.size(0); ++i) {
      const int64_t left = samples() - i * batch_size_;
      total += means.const_data_ptr<double>()[i] * static_cast<double>(std::min(left, batch_size_));
    }
    return total / static_cast<double>(samples());
  }

 private:
  static constexpr int64_t kAhead = 16;  // batches

  at::Tensor images_;  // uint8 (N, pixels)
  at::Tensor labels_;  // int64 (N)
  int64_t batch_size_, seed_;
  at::Tensor input_;  // float (N or kAhead batches, pixels), filled again and again
};

// SGD with momentum in one call and one pass: torch::optim::SGD makes four passes, in as many
// calls, for each parameter. On the CPU with the arithmetic of torch.optim.SGD to the last bit.
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
    std::vector<at::Tensor> gradients;
    gradients.reserve(parameters_.size());
    for (const at::Tensor& parameter : parameters_) gradients.push_back(parameter.grad());
    if (parameters_.front().is_cpu()) {
      return torchext::sgd_(parameters_, gradients, velocity_, lr_, momentum_);
    }
    const at::NoGradGuard no_grad;
    at::_fused_sgd_(parameters_, gradients, velocity_, /*weight_decay=*/0, momentum_, lr_,
                    /*dampening=*/0, /*nesterov=*/false, /*maximize=*/false,
                    /*is_first_step=*/false);
  }

 private:
  std::vector<at::Tensor> parameters_, velocity_;
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
        batches(digits.train_images, digits.train_labels, options.batch_size, options.seed,
                options.device),
        optimizer_(network->parameters(), options.lr, options.momentum),
        test_images_(as_bytes(digits.test_images, options.device)),
        test_labels_(as_bytes(digits.test_labels, options.device).squeeze(1)) {}

  // Trains for an epoch, counted from 1, and returns the mean loss of a sample. Calls after_step()
  // after each step; if that says false, the epoch ends there.
  template <typename Function>
  double train_epoch(int64_t epoch, const Function& after_step) {
    std::vector<at::Tensor> losses;
    batches.epoch(epoch, [&](const at::Tensor& images, const at::Tensor& labels) {
      losses.push_back(step(images, labels));
      return after_step();
    });
    return batches.mean_loss(losses);
  }

  // One step on a batch; returns its mean loss before the step. Not a number: .item() would wait
  // for a GPU in every step.
  at::Tensor step(const at::Tensor& images, const at::Tensor& labels) {
    optimizer_.zero_grad();
    const at::Tensor loss = network->loss(images, labels);
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
      const at::Tensor images = test_images_.narrow(0, begin, size).to(at::kFloat).div_(255);
      const at::Tensor labels = test_labels_.narrow(0, begin, size);
      right += network->forward(images).argmax(1).eq(labels).sum().item<int64_t>();
    }
    return static_cast<double>(right) / static_cast<double>(count);
  }

  std::shared_ptr<Network> network;
  Batches batches;

 private:
  static std::shared_ptr<Network> start(const Options& options) {
    torch::manual_seed(static_cast<uint64_t>(options.seed));
    auto network = std::make_shared<Network>(options.model);
    network->to(options.device);
    return network;
  }

  Sgd optimizer_;
  at::Tensor test_images_, test_labels_;  // uint8 (N, pixels), (N)
};
