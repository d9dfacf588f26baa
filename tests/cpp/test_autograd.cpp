// The functions of torchext/autograd.h against their eager definitions, values and gradients.
#include <torch/torch.h>
#include <torchext/torchext.h>

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace {

using at::Tensor;
using torch::autograd::grad;
using Tensors = std::vector<Tensor>;
using Function = std::function<Tensor(const Tensors&)>;

const std::vector<std::pair<at::ScalarType, double>> kTolerances = {
    {at::kDouble, 1e-12}, {at::kFloat, 2e-5}, {at::kBFloat16, 3e-2}, {at::kHalf, 4e-3}};

Tensor random(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat, bool requires_grad = true) {
  return at::randn(sizes, at::kDouble).to(dtype).requires_grad_(requires_grad);
}

bool is_fused(const Tensor& tensor) {
  return tensor.grad_fn()->name().find("torchext") != std::string::npos;
}

Tensor linear_relu(const Tensors& t) { return torchext::linear_relu(t[0], t[1], t[2]); }
Tensor stock_linear_relu(const Tensors& t) {
  return at::relu(at::linear(t[0], t[1], t[2].defined() ? std::optional(t[2]) : std::nullopt));
}

struct Loss {
  Tensor target;
  Tensor weight;
  int64_t reduction = at::Reduction::Mean;
  int64_t ignore_index = -100;
  double label_smoothing = 0;

  Tensor fused(const Tensors& t) const {
    return torchext::cross_entropy(t[0], target, weight, reduction, ignore_index, label_smoothing);
  }
  Tensor fused_linear(const Tensors& t) const {
    return torchext::linear_cross_entropy(t[0], t[1], target, t[2], weight, reduction, ignore_index,
                                          label_smoothing);
  }
  Tensor stock_linear(const Tensors& t) const {
    return stock({at::linear(t[0], t[1], t[2].defined() ? std::optional(t[2]) : std::nullopt)});
  }
  Tensor stock(const Tensors& t) const {
    return at::cross_entropy_loss(t[0],
                                  target.scalar_type() == at::kInt ? target.to(at::kLong) : target,
                                  weight.defined() ? std::optional(weight) : std::nullopt,
                                  reduction, ignore_index, label_smoothing);
  }
};

// Copies in another dtype, with gradients of their own.
Tensors as(at::ScalarType dtype, const Tensors& tensors) {
  Tensors copies;
  for (const Tensor& tensor : tensors) {
    copies.push_back(
        tensor.defined()
            ? tensor.detach().to(dtype, false, /*copy=*/true).requires_grad_(tensor.requires_grad())
            : Tensor());
  }
  return copies;
}

// Value and gradients of both, for a random upstream gradient.
void check_same(const Function& fused, const Function& stock, const Tensors& inputs,
                double tolerance) {
  const Tensors ours = as(inputs[0].scalar_type(), inputs);
  const Tensors theirs = as(inputs[0].scalar_type(), inputs);
  const Tensor actual = fused(ours), expected = stock(theirs);
  EXPECT(is_fused(actual));
  EXPECT_CLOSE(actual, expected, tolerance);
  const Tensor upstream = at::randn(expected.sizes(), at::kDouble).to(expected.dtype());
  actual.backward(upstream);
  expected.backward(upstream);
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].defined()) EXPECT_CLOSE(ours[i].grad(), theirs[i].grad(), tolerance);
  }
}

// Gradients of the gradients of both.
void check_second(const Function& fused, const Function& stock, const Tensors& inputs) {
  const auto second = [&](const Function& function) {
    const Tensors own = as(at::kDouble, inputs);
    const Tensor output = function(own);
    at::manual_seed(1);
    const Tensor upstream = random(output.sizes(), at::kDouble);
    Tensors wanted;
    for (const Tensor& tensor : own) {
      if (tensor.defined()) wanted.push_back(tensor);
    }
    Tensor total = at::zeros({}, at::kDouble);
    for (const Tensor& first : grad({output}, wanted, {upstream}, true, /*create_graph=*/true)) {
      total = total + (first * first).sum();
    }
    wanted.push_back(upstream);
    return grad({total}, wanted, {}, std::nullopt, false, /*allow_unused=*/true);
  };
  const auto actual = second(fused), expected = second(stock);
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_CLOSE(actual[i], expected[i], 1e-10);
}

TEST(linear_relu_is_the_stock_one) {
  for (const auto& [dtype, tolerance] : kTolerances) {
    for (const at::IntArrayRef leading :
         {at::IntArrayRef{5}, at::IntArrayRef{1}, at::IntArrayRef{0}, at::IntArrayRef{},
          at::IntArrayRef{2, 3, 7}}) {
      for (const bool with_bias : {true, false}) {
        std::vector<int64_t> sizes = leading.vec();
        sizes.push_back(13);
        check_same(linear_relu, stock_linear_relu,
                   {random(sizes, dtype), random({9, 13}, dtype),
                    with_bias ? random({9}, dtype) : Tensor()},
                   tolerance);
      }
    }
  }
}

TEST(linear_relu_of_strided_tensors) {
  check_same([](const Tensors& t) { return torchext::linear_relu(t[0].t(), t[1].t(), t[2]); },
             [](const Tensors& t) { return at::relu(at::linear(t[0].t(), t[1].t(), t[2])); },
             {random({13, 5}), random({13, 9}), random({9})}, 2e-5);
}

TEST(linear_relu_gives_only_the_gradients_asked_for) {
  for (int which = 0; which < 3; ++which) {
    check_same(linear_relu, stock_linear_relu,
               {random({5, 13}, at::kFloat, which == 0), random({9, 13}, at::kFloat, which == 1),
                random({9}, at::kFloat, which == 2)},
               2e-5);
  }
  const Tensors t = {random({5, 13}), random({9, 13}), random({9})};
  const auto found = grad({linear_relu(t).sum()}, {t[1]});
  EXPECT_CLOSE(found[0], grad({stock_linear_relu(t).sum()}, {t[1]})[0], 2e-5);
}

// Every kind of loss over 7 classes of 6 samples.
std::vector<Loss> losses(at::ScalarType dtype) {
  const Tensor indices = at::randint(7, {6}, at::kLong);
  const Tensor probabilities = at::randn({6, 7}).softmax(1).to(dtype);
  std::vector<Loss> all;
  for (const int64_t reduction : {at::Reduction::None, at::Reduction::Mean, at::Reduction::Sum}) {
    for (const double smoothing : {0.0, 0.2}) {
      for (const Tensor& target : {indices, indices.to(at::kInt), probabilities}) {
        for (const Tensor& weight : {Tensor(), at::rand({7}).to(dtype)}) {
          const int64_t ignored = target.is_floating_point() ? -100 : indices[0].item<int64_t>();
          all.push_back({target, weight, reduction, ignored, smoothing});
        }
      }
    }
  }
  return all;
}

TEST(cross_entropy_is_the_stock_one) {
  for (const auto& [dtype, tolerance] : kTolerances) {
    for (const Loss& loss : losses(dtype)) {
      check_same([&](const Tensors& t) { return loss.fused(t); },
                 [&](const Tensors& t) { return loss.stock(t); }, {random({6, 7}, dtype)},
                 tolerance);
    }
  }
}

TEST(linear_cross_entropy_is_the_stock_one) {
  for (const auto& [dtype, tolerance] : kTolerances) {
    // The stock ops round the logits and their gradient on the way.
    const double rounded = dtype == at::kBFloat16 || dtype == at::kHalf ? 4 * tolerance : tolerance;
    for (const Loss& loss : losses(dtype)) {
      for (const Tensor& bias : {random({7}, dtype), Tensor()}) {
        check_same([&](const Tensors& t) { return loss.fused_linear(t); },
                   [&](const Tensors& t) { return loss.stock_linear(t); },
                   {random({6, 5}, dtype), random({7, 5}, dtype), bias}, rounded);
      }
    }
  }
}

TEST(linear_cross_entropy_gives_only_the_gradients_asked_for) {
  const Loss loss{at::randint(7, {6}, at::kLong), {}};
  for (int which = 0; which < 3; ++which) {
    check_same([&](const Tensors& t) { return loss.fused_linear(t); },
               [&](const Tensors& t) { return loss.stock_linear(t); },
               {random({6, 5}, at::kFloat, which == 0), random({7, 5}, at::kFloat, which == 1),
                random({7}, at::kFloat, which == 2)},
               2e-5);
  }
}

TEST(linear_cross_entropy_of_sequences) {
  for (const int64_t reduction : {at::Reduction::None, at::Reduction::Mean}) {
    const Tensor target = at::randint(7, {2, 3}, at::kLong);
    const Tensor input = random({2, 3, 5}), weight = random({7, 5});
    const Tensor loss = torchext::linear_cross_entropy(input, weight, target, {}, {}, reduction);
    const Tensor logits = at::linear(input, weight).transpose(1, 2);
    EXPECT_CLOSE(loss, at::cross_entropy_loss(logits, target, {}, reduction), 2e-5);
  }
  EXPECT_THROWS(torchext::linear_cross_entropy(random({2, 3, 5}), random({7, 5}),
                                               at::zeros({3, 2}, at::kLong)),
                "[2, 3]");
}

TEST(cross_entropy_of_other_shapes) {
  const std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>> shapes = {
      {{7}, {}}, {{1, 7}, {1}}, {{2, 7, 3}, {2, 3}}, {{2, 7, 3, 5}, {2, 3, 5}}};
  for (const auto& [sizes, target_sizes] : shapes) {
    const Loss loss{at::randint(7, target_sizes, at::kLong), {}};
    check_same([&](const Tensors& t) { return loss.fused(t); },
               [&](const Tensors& t) { return loss.stock(t); }, {random(sizes)}, 2e-5);
  }
}

TEST(second_derivatives_are_the_stock_ones) {
  for (const Tensor& bias : {random({9}, at::kDouble), Tensor()}) {
    check_second(linear_relu, stock_linear_relu,
                 {random({5, 13}, at::kDouble), random({9, 13}, at::kDouble), bias});
  }
  for (const int64_t reduction : {at::Reduction::None, at::Reduction::Mean, at::Reduction::Sum}) {
    const Loss loss{at::randint(7, {6}, at::kLong), {}, reduction, -100, 0.1};
    check_second([&](const Tensors& t) { return loss.fused(t); },
                 [&](const Tensors& t) { return loss.stock(t); }, {random({6, 7}, at::kDouble)});
    check_second(
        [&](const Tensors& t) { return loss.fused_linear(t); },
        [&](const Tensors& t) { return loss.stock_linear(t); },
        {random({6, 5}, at::kDouble), random({7, 5}, at::kDouble), random({7}, at::kDouble)});
  }
}

TEST(a_tensor_in_two_places_has_both_its_gradients) {
  check_second([](const Tensors& t) { return torchext::linear_relu(t[0], t[0]); },
               [](const Tensors& t) { return at::relu(at::linear(t[0], t[0])); },
               {random({5, 5}, at::kDouble)});
}

TEST(backward_twice_through_one_graph) {
  const Tensor target = at::randint(7, {6}, at::kLong);
  const Tensors t = {random({6, 7}), random({7, 7})};
  for (const Tensor& loss : {torchext::cross_entropy(t[0], target),
                             torchext::linear_cross_entropy(t[0], t[1], target)}) {
    const Tensor three = at::full({}, 3.0f);
    const Tensor first = grad({loss}, {t[0]}, {three}, /*retain_graph=*/true)[0];
    const Tensor second = grad({loss}, {t[0]}, {}, /*retain_graph=*/true)[0].clone();
    EXPECT_CLOSE(first, 3 * second, 1e-6);
    EXPECT_CLOSE(grad({loss}, {t[0]}, {three})[0], first, 0);
    EXPECT_THROWS(grad({loss}, {t[0]}), "second time");
  }
}

// A loss that drops its argument's gradient.
struct NoGradient : torch::autograd::Function<NoGradient> {
  static Tensor forward(torch::autograd::AutogradContext*, const Tensor& input) {
    return input.sum();
  }
  static Tensors backward(torch::autograd::AutogradContext*, const Tensors&) { return {Tensor()}; }
};

TEST(an_undefined_gradient_stays_undefined) {
  const Tensor input = random({5, 13}), weight = random({9, 13});
  NoGradient::apply(torchext::linear_relu(input, weight)).backward();
  EXPECT(!input.grad().defined() && !weight.grad().defined());
  const Tensor logits = random({6, 7});
  NoGradient::apply(torchext::cross_entropy(logits, at::randint(7, {6}, at::kLong))).backward();
  EXPECT(!logits.grad().defined());
}

TEST(no_graph_where_none_is_wanted) {
  const Tensors t = {random({5, 13}), random({9, 13}), random({9})};
  const Tensor target = at::randint(13, {5}, at::kLong);
  const auto check = [&] {
    EXPECT(!linear_relu(t).requires_grad());
    EXPECT(!torchext::cross_entropy(t[0], target).requires_grad());
    EXPECT_CLOSE(linear_relu(t), stock_linear_relu(t), 2e-5);
    EXPECT_CLOSE(torchext::cross_entropy(t[0], target), at::cross_entropy_loss(t[0], target), 2e-5);
  };
  {
    const at::NoGradGuard no_grad;
    check();
  }
  const c10::InferenceMode inference;
  check();
}

TEST(what_no_kernel_serves_is_the_stock_op) {
  const Tensor logits = random({6, 7});
  Tensor probabilities = at::randn({6, 7}).softmax(1).requires_grad_();
  const Tensor loss = torchext::cross_entropy(logits, probabilities);
  EXPECT(!is_fused(loss));
  loss.backward();
  EXPECT(probabilities.grad().defined());
  const at::TensorOptions meta(at::kMeta);
  EXPECT(torchext::cross_entropy(at::empty({6, 7}, meta), at::empty({6}, meta.dtype(at::kLong)))
             .is_meta());
  const Tensor whole =
      torchext::linear_relu(at::ones({5, 13}, at::kLong), at::ones({9, 13}, at::kLong));
  EXPECT_CLOSE(whole, at::full({5, 9}, 13, at::kLong), 0);
  const Tensor complex = at::randn({5, 13}, at::kComplexFloat);
  EXPECT_THROWS(torchext::linear_relu(complex, at::randn({9, 13}, at::kComplexFloat)), "complex");
  EXPECT(torchext::linear_relu(at::randn({5, 13}), at::randn({13})).sizes() ==
         at::IntArrayRef({5}));
  EXPECT(
      torchext::cross_entropy(at::empty({0, 7}), at::empty({0}, at::kLong)).isnan().item<bool>());
}

TEST(autocast_is_the_stock_one) {
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const Tensor output = torchext::linear_relu(random({5, 13}), random({9, 13}));
  const Tensor loss =
      torchext::cross_entropy(random({6, 7}, at::kBFloat16), at::randint(7, {6}, at::kLong));
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  EXPECT(output.scalar_type() == at::kBFloat16);
  EXPECT(loss.scalar_type() == at::kFloat);
}

TEST(forward_mode_is_the_stock_one) {
  const Tensor input = random({5, 13}, at::kFloat, false), weight = random({9, 13});
  const Tensor tangent = at::randn({5, 13});
  const uint64_t level = torch::autograd::forward_ad::enter_dual_level();
  const Tensor dual = at::_make_dual(input, tangent, static_cast<int64_t>(level));
  const Tensor ours = std::get<1>(at::_unpack_dual(torchext::linear_relu(dual, weight), level));
  const Tensor theirs = std::get<1>(at::_unpack_dual(at::relu(at::linear(dual, weight)), level));
  torch::autograd::forward_ad::exit_dual_level(level);
  EXPECT_CLOSE(ours, theirs, 2e-5);
}

TEST(wrong_arguments_are_named) {
  EXPECT_THROWS(torchext::linear_relu(random({5, 12}), random({9, 13})), "in_features");
  EXPECT_THROWS(torchext::linear_relu(random({5, 13}), random({9, 13}, at::kDouble)), "dtype");
  EXPECT_THROWS(torchext::cross_entropy(random({6, 7}), at::full({6}, 7, at::kLong)), "7");
  EXPECT_THROWS(torchext::cross_entropy(random({6, 7}), at::zeros({5}, at::kLong)), "batch size");
  EXPECT_THROWS(
      torchext::cross_entropy(random({6, 7}), at::rand({6, 7}), {}, 1, /*ignore_index=*/3),
      "ignore_index");
}

}  // namespace

int main(int argc, char** argv) {
  at::manual_seed(0);
  return check::run(argc > 1 ? argv[1] : "");
}
