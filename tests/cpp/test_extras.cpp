// The losses with extras against their definition by torch's ops, written out here, and the
// dimensions that only linear_cross_entropy has.
#include <torch/torch.h>
#include <torchext/torchext.h>

#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace {

using at::Tensor;
using torch::autograd::grad;
using torchext::LossExtras;
using torchext::LossResult;
using Tensors = std::vector<Tensor>;

const std::vector<std::pair<at::ScalarType, double>> kTolerances = {
    {at::kDouble, 1e-11}, {at::kFloat, 2e-5}, {at::kBFloat16, 4e-2}, {at::kHalf, 8e-3}};

Tensor random(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::randn(sizes, at::kDouble).to(dtype).requires_grad_();
}

struct Call {
  Tensor target, weight;
  int64_t reduction = at::Reduction::Mean;
  int64_t ignore_index = -100;
  double label_smoothing = 0;
  LossExtras extras;

  LossResult fused(const Tensors& t) const {
    if (!t[1].defined()) {
      return torchext::cross_entropy_extras(t[0], target, extras, weight, reduction, ignore_index,
                                            label_smoothing);
    }
    return torchext::linear_cross_entropy_extras(t[0], t[1], target, extras, t[2], weight,
                                                 reduction, ignore_index, label_smoothing);
  }

  // In float64, of rows of logits.
  LossResult truth(const Tensors& t) const {
    Tensor z = t[0];
    if (t[1].defined())
      z = at::linear(z, t[1], t[2].defined() ? std::optional(t[2]) : std::nullopt);
    z = z * extras.logit_scale();
    if (extras.softcap()) z = *extras.softcap() * (z / *extras.softcap()).tanh();
    const bool indices = !target.is_floating_point();
    const Tensor goal = indices ? target.to(at::kLong) : target.to(at::kDouble);
    const auto weights = weight.defined() ? std::optional(weight.to(at::kDouble)) : std::nullopt;
    const Tensor lse = z.logsumexp(1);
    Tensor rows = at::cross_entropy_loss(z, goal, weights, at::Reduction::None, ignore_index,
                                         label_smoothing);
    const Tensor kept = indices ? goal.ne(ignore_index) : at::ones({z.size(0)}, at::kBool);
    rows = rows + extras.z_loss() * lse.square() * kept;
    Tensor loss = rows;
    if (reduction != at::Reduction::None) loss = rows.sum();
    if (reduction == at::Reduction::Mean) {
      Tensor mass = kept.to(at::kDouble);
      if (indices && weights) mass = weights->index({goal.where(kept, 0)}) * mass;
      mass = mass.sum();
      if (extras.ignored_mean() == "zero" && mass.item<double>() == 0) mass.fill_(INFINITY);
      loss = loss / mass;
    }
    return {loss, lse, z.argmax(1)};
  }
};

std::vector<LossExtras> some_extras() {
  return {LossExtras().z_loss(0.01), LossExtras().softcap(2.0).return_argmax(true),
          LossExtras().logit_scale(0.5).return_lse(true),
          LossExtras().z_loss(0.01).softcap(3.0).logit_scale(1.5).return_lse(true),
          LossExtras().return_lse(true).return_argmax(true).ignored_mean("zero")};
}

std::vector<Call> calls(int64_t rows, int64_t classes, at::ScalarType dtype) {
  const Tensor indices = at::randint(classes, {rows}, at::kLong);
  const Tensor probabilities = at::randn({rows, classes}).softmax(1).to(dtype);
  const Tensor weight = at::rand({classes}).add(0.1).to(dtype);
  std::vector<Call> all;
  for (const LossExtras& extras : some_extras()) {
    for (const int64_t reduction : {at::Reduction::None, at::Reduction::Mean, at::Reduction::Sum}) {
      all.push_back({indices, {}, reduction, indices[0].item<int64_t>(), 0, extras});
      all.push_back({indices.to(at::kInt), weight, reduction, -100, 0.2, extras});
      all.push_back({probabilities, weight, reduction, -100, 0.1, extras});
    }
  }
  return all;
}

// Values and gradients, for random upstream gradients of the loss and the lse.
void check_call(const Call& call, const Tensors& inputs, double tolerance, bool fused) {
  Tensors own, exact;
  for (const Tensor& tensor : inputs) {
    own.push_back(tensor.defined() ? tensor.detach().clone().requires_grad_() : Tensor());
    exact.push_back(tensor.defined() ? tensor.detach().to(at::kDouble).requires_grad_() : Tensor());
  }
  const LossResult actual = call.fused(own), expected = call.truth(exact);
  EXPECT((actual.loss.grad_fn()->name().find("torchext") != std::string::npos) == fused);
  EXPECT(actual.loss.scalar_type() == inputs[0].scalar_type());
  EXPECT_CLOSE(actual.loss.to(at::kDouble), expected.loss, tolerance);
  EXPECT(actual.lse.defined() == call.extras.return_lse());
  EXPECT(actual.argmax.defined() == call.extras.return_argmax());
  if (actual.argmax.defined() && inputs[0].scalar_type() == at::kDouble) {
    EXPECT_CLOSE(actual.argmax, expected.argmax, 0);
  }
  const Tensor upstream = at::randn(expected.loss.sizes(), at::kDouble);
  Tensors outputs = {actual.loss}, grads = {upstream.to(actual.loss.dtype())};
  Tensor total = (expected.loss * upstream).sum();
  if (actual.lse.defined()) {
    EXPECT_CLOSE(actual.lse.to(at::kDouble), expected.lse, tolerance);
    const Tensor second = at::randn(expected.lse.sizes(), at::kDouble);
    outputs.push_back(actual.lse);
    grads.push_back(second.to(actual.lse.dtype()));
    total = total + (expected.lse * second).sum();
  }
  torch::autograd::backward(outputs, grads);
  total.backward();
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].defined()) continue;
    EXPECT_CLOSE(own[i].grad().to(at::kDouble), exact[i].grad(), tolerance);
  }
}

TEST(extras_of_logits) {
  for (const auto& [dtype, tolerance] : kTolerances) {
    for (const Call& call : calls(6, 40, dtype)) {
      check_call(call, {random({6, 40}, dtype), {}, {}}, tolerance, true);
    }
    // Few classes are made of torch's ops.
    for (const Call& call : calls(6, 7, dtype)) {
      check_call(call, {random({6, 7}, dtype), {}, {}}, 2 * tolerance, false);
    }
  }
}

TEST(extras_of_a_linear_transformation) {
  for (const auto& [dtype, tolerance] : kTolerances) {
    for (const Call& call : calls(6, 40, dtype)) {
      for (const Tensor& bias : {random({40}, dtype), Tensor()}) {
        check_call(call, {random({6, 5}, dtype), random({40, 5}, dtype), bias}, 4 * tolerance,
                   true);
      }
    }
  }
}

TEST(extras_of_more_rows_than_a_chunk) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const Tensor target = at::randint(6000, {900}, at::kLong);
    const LossExtras extras = LossExtras().z_loss(1e-3).softcap(20);
    for (const int64_t reduction : {at::Reduction::None, at::Reduction::Mean}) {
      check_call({target, {}, reduction, -100, 0, extras},
                 {random({900, 4}, dtype), random({6000, 4}, dtype), random({6000}, dtype)},
                 dtype == at::kFloat ? 1e-4 : 0.1, true);
    }
  }
}

TEST(extras_second_derivatives) {
  const Tensor target = at::randint(20, {6}, at::kLong);
  const Call call{target, {},  at::Reduction::Mean,
                  -100,   0.1, LossExtras().z_loss(0.01).softcap(3.0).return_lse(true)};
  const Tensors inputs = {random({6, 5}, at::kDouble), random({20, 5}, at::kDouble),
                          random({20}, at::kDouble)};
  const Tensor upstream = at::randn({6}, at::kDouble);
  const auto second = [&](const LossResult& result) {
    const Tensor total = 3 * result.loss + (result.lse * upstream).sum();
    Tensor squares = at::zeros({}, at::kDouble);
    for (const Tensor& first : grad({total}, inputs, {}, true, /*create_graph=*/true)) {
      squares = squares + first.square().sum();
    }
    return grad({squares}, inputs);
  };
  const auto actual = second(call.fused(inputs)), expected = second(call.truth(inputs));
  for (size_t i = 0; i < 3; ++i) EXPECT_CLOSE(actual[i], expected[i], 1e-9);
}

TEST(extras_of_ignored_rows_and_of_targets_without_weight) {
  for (const int64_t classes : {40, 7}) {
    Tensor weight = at::ones({classes});
    weight[0] = 0;
    for (const int64_t index : {-100, 0}) {
      const Tensor target = at::full({6}, index, at::kLong);
      const Tensor logits = random({6, classes}, at::kFloat);
      const auto loss = [&](const std::string& mean) {
        const auto extras = LossExtras().z_loss(0.1).ignored_mean(mean);
        return torchext::cross_entropy_extras(logits, target, extras,
                                              index == 0 ? weight : Tensor(), at::Reduction::Mean,
                                              -100, index == 0 ? 0.1 : 0.0)
            .loss;
      };
      EXPECT(loss("nan").isnan().item<bool>());
      EXPECT(loss("zero").item<float>() == 0);
      loss("zero").backward();
      EXPECT_CLOSE(logits.grad(), at::zeros({6, classes}), 0);
    }
  }
}

TEST(extras_without_gradients_and_wrong_ones) {
  const Tensor logits = at::randn({6, 40}), target = at::randint(40, {6}, at::kLong);
  const auto result = torchext::cross_entropy_extras(logits, target, LossExtras().return_lse(true));
  EXPECT(!result.loss.requires_grad() && !result.lse.requires_grad());
  EXPECT_CLOSE(result.lse, logits.logsumexp(1), 1e-6);
  EXPECT_THROWS(torchext::cross_entropy_extras(logits, target, LossExtras().softcap(0)), "softcap");
  EXPECT_THROWS(torchext::cross_entropy_extras(logits, target, LossExtras().ignored_mean("0")),
                "ignored_mean");
  EXPECT_THROWS(torchext::cross_entropy_extras(logits, target.fill_(40), LossExtras().z_loss(0.1)),
                "40");
}

TEST(infinite_gradients_leave_ignored_rows_alone) {
  Tensor target = at::randint(40, {6}, at::kLong);
  target[2] = -100;
  const Tensor logits = random({6, 40}, at::kFloat), head = random({40, 40}, at::kFloat);
  const Tensor infinity = at::full({}, std::numeric_limits<float>::infinity());
  const Tensors losses = {
      torchext::cross_entropy(logits, target), torchext::linear_cross_entropy(logits, head, target),
      torchext::cross_entropy_extras(logits, target, LossExtras().z_loss(0.1)).loss};
  for (const Tensor& loss : losses) {
    const Tensor found = grad({loss}, {logits}, {infinity})[0];
    EXPECT_CLOSE(found[2], at::zeros({40}), 0);
    EXPECT(found[1].isfinite().logical_not().any().item<bool>());
  }
}

TEST(the_gradient_takes_the_place_of_the_logits) {
  const Tensor target = at::randint(40, {6}, at::kLong);
  const auto plain = LossExtras().inplace_backward(true);
  for (const LossExtras& extras :
       {plain, LossExtras(plain).z_loss(0.1), LossExtras(plain).softcap(2).return_argmax(true)}) {
    const Tensor leaf = random({6, 40}, at::kFloat);
    const Tensor logits = leaf * 1;
    const auto expected =
        torchext::cross_entropy_extras(leaf, target, LossExtras(extras).inplace_backward(false));
    const auto actual = torchext::cross_entropy_extras(logits, target, extras);
    EXPECT_CLOSE(actual.loss, expected.loss, 1e-6);
    EXPECT_CLOSE(actual.argmax, expected.argmax, 0);
    const Tensor upstream = at::randn({});
    const Tensor truth = grad({expected.loss}, {leaf}, {upstream})[0];
    EXPECT_CLOSE(logits.detach() * upstream, truth, 1e-6);
    EXPECT_CLOSE(grad({actual.loss}, {leaf}, {upstream})[0], truth, 1e-6);
  }
  // Who needs the logits afterwards is told.
  const Tensor leaf = random({6, 40}, at::kFloat);
  const Tensor logits = leaf * 1;
  const Tensor other = logits.exp().sum() + logits.square().sum();
  const Tensor loss = torchext::cross_entropy_extras(logits, target, plain).loss;
  EXPECT_THROWS(other.backward(), "modified by an inplace operation");
  EXPECT_THROWS(grad({loss}, {logits}, {}, true, /*create_graph=*/true), "inplace_backward");
  // A second backward through a graph that is kept has the gradient again.
  const Tensor first = grad({loss}, {logits}, {at::full({}, 2.0f)}, /*retain_graph=*/true)[0];
  EXPECT_CLOSE(2 * grad({loss}, {logits})[0], first, 1e-6);
}

TEST(other_dtypes_and_biases_are_the_stock_ones) {
  const Tensor logits = random({6, 40}, at::kFloat), target = at::randint(40, {6}, at::kLong);
  const Tensor goal = at::randn({6, 40}, at::kDouble).softmax(1),
               weight = at::rand({40}, at::kDouble);
  EXPECT_CLOSE(torchext::cross_entropy(logits, goal), at::cross_entropy_loss(logits, goal), 1e-6);
  EXPECT_CLOSE(torchext::cross_entropy(logits, goal.to(at::kFloat), weight),
               at::cross_entropy_loss(logits, goal.to(at::kFloat), weight), 1e-6);
  const Tensor input = random({6, 5}, at::kFloat), head = random({40, 5}, at::kFloat);
  for (const Tensor& bias : {at::randn({1}), at::randn({}), at::randn({6, 40})}) {
    EXPECT_CLOSE(torchext::linear_relu(input, head, bias), at::relu(at::linear(input, head, bias)),
                 1e-5);
    EXPECT_THROWS(torchext::linear_cross_entropy(input, head, target, bias), "bias");
    EXPECT_THROWS(
        torchext::linear_cross_entropy_extras(input, head, target, LossExtras().z_loss(0.1), bias),
        "bias");
  }
}

TEST(errors_are_of_torchs_classes) {
  const Tensor logits = at::randn({6, 40}), head = at::randn({40, 40});
  const Tensor outside = at::full({6}, 40, at::kLong), fewer = at::zeros({5}, at::kLong);
  const auto classes = [](const std::function<void()>& call) {
    try {
      call();
    } catch (const c10::IndexError&) {
      return "IndexError";
    } catch (const c10::ValueError&) {
      return "ValueError";
    } catch (const c10::Error&) {
      return "Error";
    } catch (const std::exception&) {
      return "another";
    }
    return "none";
  };
  const auto z_loss = LossExtras().z_loss(0.1);
  EXPECT(classes([&] { torchext::cross_entropy(logits, outside); }) == std::string("IndexError"));
  EXPECT(classes([&] { torchext::cross_entropy_extras(logits, outside, z_loss); }) ==
         std::string("IndexError"));
  EXPECT(classes([&] { torchext::linear_cross_entropy(logits, head, outside); }) ==
         std::string("IndexError"));
  EXPECT(classes([&] { torchext::cross_entropy(logits, fewer); }) == std::string("ValueError"));
  EXPECT(classes([&] { torchext::linear_relu(logits, at::randn({4, 39})); }) ==
         std::string("Error"));
  EXPECT(classes([&] {
           torchext::cross_entropy_extras(logits, fewer, LossExtras().softcap(INFINITY));
         }) == std::string("ValueError"));
}

TEST(logits_may_be_changed_after_the_loss) {
  const Tensor leaf = random({6, 40}, at::kFloat), target = at::randint(40, {6}, at::kLong);
  const Tensor truth = grad({at::cross_entropy_loss(leaf, target)}, {leaf})[0];
  const Tensor logits = leaf * 1;
  const Tensor loss = torchext::cross_entropy(logits, target);
  {
    const at::NoGradGuard no_grad;
    logits.zero_();
  }
  EXPECT_THROWS(grad({loss}, {leaf}, {}, true, /*create_graph=*/true), "modified by an inplace");
  EXPECT_CLOSE(grad({loss}, {leaf})[0], truth, 1e-6);
}

TEST(a_mean_over_no_rows_of_probabilities) {
  const Tensor loss = torchext::cross_entropy_extras(at::randn({0, 8}), at::rand({0, 8}),
                                                     LossExtras().ignored_mean("zero"))
                          .loss;
  EXPECT(loss.item<float>() == 0);
}

TEST(linear_cross_entropy_of_k_dimensions) {
  for (const std::vector<int64_t>& inner : {std::vector<int64_t>{3}, {2, 3}}) {
    std::vector<int64_t> positions = {6}, rows = {20}, goal = {6, 20};
    for (auto* sizes : {&positions, &rows, &goal}) {
      sizes->insert(sizes->end(), inner.begin(), inner.end());
    }
    std::vector<int64_t> weights = rows;
    weights.push_back(5);
    const Tensors targets = {at::randint(20, positions, at::kLong),
                             at::randn(goal).softmax(1).to(at::kDouble)};
    for (const Tensor& target : targets) {
      for (const int64_t reduction : {at::Reduction::None, at::Reduction::Mean}) {
        for (const bool capped : {false, true}) {
          Tensors own = {random({6, 5}, at::kDouble), random(weights, at::kDouble),
                         random(rows, at::kDouble)};
          Tensor logits = at::linear(own[0], own[1].flatten(0, -2), own[2].flatten()).view(goal);
          if (capped) logits = 2 * (logits / 2).tanh();
          const Tensor expected = at::cross_entropy_loss(logits, target, {}, reduction, -100, 0.1);
          const Tensor actual =
              capped ? torchext::linear_cross_entropy_extras(own[0], own[1], target,
                                                             LossExtras().softcap(2), own[2], {},
                                                             reduction, -100, 0.1)
                           .loss
                     : torchext::linear_cross_entropy(own[0], own[1], target, own[2], {}, reduction,
                                                      -100, 0.1);
          EXPECT_CLOSE(actual, expected, 1e-12);
          const Tensor upstream = at::randn(expected.sizes(), at::kDouble);
          const auto found = grad({actual}, own, {upstream});
          const auto truth = grad({expected}, own, {upstream});
          for (size_t i = 0; i < own.size(); ++i) EXPECT_CLOSE(found[i], truth[i], 1e-12);
        }
      }
    }
  }
  // Dimensions in another order are as many numbers.
  EXPECT_THROWS(torchext::linear_cross_entropy(at::randn({6, 5}), at::randn({20, 2, 3, 5}),
                                               at::zeros({6, 3, 2}, at::kLong)),
                "target");
}

TEST(modules_with_extras) {
  namespace nn = torchext::nn;
  const Tensor target = at::randint(20, {6, 3}, at::kLong), input = at::randn({6, 5});
  const auto options = nn::LinearCrossEntropyLossOptions(5, 20).out_features({3}).bias(true);
  nn::LinearCrossEntropyLoss head(options);
  EXPECT(head->linear->weight.sizes() == at::IntArrayRef({60, 5}));
  const Tensor logits = head->linear(input).view({6, 20, 3});
  EXPECT_CLOSE(head(input, target), at::cross_entropy_loss(logits, target), 1e-6);
  nn::LinearCrossEntropyLoss capped(
      nn::LinearCrossEntropyLossOptions(options).extras(LossExtras().return_lse(true)));
  const LossResult result = capped->results(input, target);
  EXPECT(result.lse.sizes() == at::IntArrayRef({6, 3}));
  EXPECT_CLOSE(capped(input, target), result.loss, 0);
  nn::CrossEntropyLoss loss(nn::CrossEntropyLossOptions(), LossExtras().z_loss(0.1));
  const Tensor lse = logits.logsumexp(1);
  EXPECT_CLOSE(loss(logits, target),
               at::cross_entropy_loss(logits, target) + 0.1 * lse.square().mean(), 1e-5);
  const auto clone = std::dynamic_pointer_cast<nn::CrossEntropyLossImpl>(loss->clone());
  EXPECT_CLOSE(clone->forward(logits, target), loss(logits, target), 0);
}

}  // namespace
