// Modules over the fused ops: drop-ins for their torch::nn namesakes.
#pragma once

#include <c10/util/accumulate.h>
#include <torch/arg.h>
#include <torch/enum.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/options/linear.h>
#include <torch/nn/options/loss.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <ostream>
#include <utility>
#include <vector>

#include <torchext/autograd.h>

namespace torchext::nn {

using LinearReLUOptions = torch::nn::LinearOptions;
using CrossEntropyLossOptions = torch::nn::CrossEntropyLossOptions;

// relu(input @ weight.T + bias), with the options, parameters and initialisation of
// torch::nn::Linear.
//
//   LinearReLU hidden(784, 64);
//   LinearReLU hidden(LinearReLUOptions(784, 64).bias(false));
//
// Not derived from it: clone() of a class derived from torch::nn::LinearImpl makes a Linear.
class LinearReLUImpl : public torch::nn::Cloneable<LinearReLUImpl> {
 public:
  LinearReLUImpl(int64_t in_features, int64_t out_features)
      : LinearReLUImpl(LinearReLUOptions(in_features, out_features)) {}
  explicit LinearReLUImpl(const LinearReLUOptions& options_) : options(options_) {
    LinearReLUImpl::reset();
  }

  void reset() override {
    weight =
        register_parameter("weight", torch::empty({options.out_features(), options.in_features()}));
    bias = register_parameter("bias",
                              options.bias() ? torch::empty(options.out_features()) : at::Tensor(),
                              /*requires_grad=*/options.bias());
    reset_parameters();
  }

  void reset_parameters() {
    torch::nn::init::kaiming_uniform_(weight, std::sqrt(5));
    if (bias.defined()) {
      const double bound = 1 / std::sqrt(options.in_features());
      torch::nn::init::uniform_(bias, -bound, bound);
    }
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "torchext::nn::LinearReLU(in_features=" << options.in_features()
           << ", out_features=" << options.out_features()
           << ", bias=" << (options.bias() ? "true" : "false") << ")";
  }

  // input (*, in_features), result (*, out_features)
  at::Tensor forward(const at::Tensor& input) { return linear_relu(input, weight, bias); }

  LinearReLUOptions options;
  at::Tensor weight;  // (out_features, in_features)
  at::Tensor bias;    // (out_features), or undefined
};
TORCH_MODULE(LinearReLU);

// The cross-entropy between logits and targets, with the options of torch::nn::CrossEntropyLoss.
//
//   CrossEntropyLoss loss(CrossEntropyLossOptions().label_smoothing(0.1).reduction(torch::kSum));
//   CrossEntropyLoss loss(CrossEntropyLossOptions(), LossExtras().z_loss(1e-4));
class CrossEntropyLossImpl : public torch::nn::Cloneable<CrossEntropyLossImpl> {
 public:
  explicit CrossEntropyLossImpl(CrossEntropyLossOptions options_ = {}, LossExtras extras_ = {})
      : options(std::move(options_)), extras(std::move(extras_)) {
    CrossEntropyLossImpl::reset();
  }

  void reset() override { weight = register_buffer("weight", options.weight()); }

  void pretty_print(std::ostream& stream) const override {
    stream << "torchext::nn::CrossEntropyLoss()";
  }

  // input (N, C, ...), target (N, ...) of class indices or (N, C, ...) of probabilities
  at::Tensor forward(const at::Tensor& input, const at::Tensor& target) {
    return results(input, target).loss;
  }

  // The loss with what else the extras ask for.
  LossResult results(const at::Tensor& input, const at::Tensor& target) {
    return cross_entropy_extras(input, target, extras, weight,
                                torch::enumtype::reduction_get_enum(options.reduction()),
                                options.ignore_index(), options.label_smoothing());
  }

  CrossEntropyLossOptions options;
  LossExtras extras;
  at::Tensor weight;  // (C), or undefined
};
TORCH_MODULE(CrossEntropyLoss);

// The options of LinearCrossEntropyLoss: those of Python's torch.nn.LinearCrossEntropyLoss, and the
// extras.
struct LinearCrossEntropyLossOptions {
  LinearCrossEntropyLossOptions(int64_t in_features, int64_t num_classes)
      : in_features_(in_features), num_classes_(num_classes) {}

  TORCH_ARG(int64_t, in_features);
  TORCH_ARG(int64_t, num_classes);
  TORCH_ARG(std::vector<int64_t>, out_features);  // (d1, ..., dK) of a K-dimensional loss
  TORCH_ARG(bool, bias) = false;
  TORCH_ARG(at::Tensor, weight);  // of each class, (num_classes), or undefined
  TORCH_ARG(CrossEntropyLossOptions::reduction_t, reduction) = torch::kMean;
  TORCH_ARG(int64_t, ignore_index) = -100;
  TORCH_ARG(double, label_smoothing) = 0.0;
  TORCH_ARG(LossExtras, extras);
};

// The head of a classifier and its loss, without the logits. Parameters linear.weight, linear.bias.
class LinearCrossEntropyLossImpl : public torch::nn::Cloneable<LinearCrossEntropyLossImpl> {
 public:
  LinearCrossEntropyLossImpl(int64_t in_features, int64_t num_classes)
      : LinearCrossEntropyLossImpl(LinearCrossEntropyLossOptions(in_features, num_classes)) {}
  explicit LinearCrossEntropyLossImpl(LinearCrossEntropyLossOptions options_)
      : options(std::move(options_)) {
    LinearCrossEntropyLossImpl::reset();
  }

  void reset() override {
    weight = register_buffer("weight", options.weight());
    // A weight of K dimensions is kept flat, as Python's is.
    const int64_t rows = c10::multiply_integers(options.out_features()) * options.num_classes();
    linear = register_module(
        "linear", torch::nn::Linear(
                      torch::nn::LinearOptions(options.in_features(), rows).bias(options.bias())));
  }

  void pretty_print(std::ostream& stream) const override {
    stream << "torchext::nn::LinearCrossEntropyLoss(in_features=" << options.in_features()
           << ", num_classes=" << options.num_classes();
    if (!options.out_features().empty()) {
      stream << ", out_features=" << at::IntArrayRef(options.out_features());
    }
    stream << ", bias=" << (options.bias() ? "true" : "false") << ")";
  }

  // input (*, in_features), target (*) of class indices or (N, num_classes) of probabilities; with
  // out_features (N, d1, ..., dK) or (N, num_classes, d1, ..., dK)
  at::Tensor forward(const at::Tensor& input, const at::Tensor& target) {
    return results(input, target).loss;
  }

  // The loss with what else the extras ask for.
  LossResult results(const at::Tensor& input, const at::Tensor& target) {
    at::Tensor linear_weight = linear->weight, linear_bias = linear->bias;
    if (!options.out_features().empty()) {
      std::vector<int64_t> sizes = {options.num_classes()};
      sizes.insert(sizes.end(), options.out_features().begin(), options.out_features().end());
      if (linear_bias.defined()) linear_bias = linear_bias.view(sizes);
      sizes.push_back(options.in_features());
      linear_weight = linear_weight.view(sizes);
    }
    return linear_cross_entropy_extras(input, linear_weight, target, options.extras(), linear_bias,
                                       weight,
                                       torch::enumtype::reduction_get_enum(options.reduction()),
                                       options.ignore_index(), options.label_smoothing());
  }

  LinearCrossEntropyLossOptions options;
  at::Tensor weight;  // (num_classes), or undefined
  torch::nn::Linear linear{nullptr};
};
TORCH_MODULE(LinearCrossEntropyLoss);

}  // namespace torchext::nn
