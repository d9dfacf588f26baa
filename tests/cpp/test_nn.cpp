// The modules of torchext/nn.h as LibTorch uses modules, and against their torch::nn namesakes.
#include <torch/torch.h>
#include <torchext/torchext.h>

#include <sstream>
#include <string>

#include "check.h"

namespace {

using at::Tensor;
namespace ours = torchext::nn;
namespace theirs = torch::nn;

// A network that owns its layers as torch's tutorials do.
struct Network : torch::nn::Module {
  Network()
      : hidden(register_module("hidden", ours::LinearReLU(20, 8))),
        output(register_module("output", theirs::Linear(8, 5))) {}

  Tensor forward(const Tensor& input) { return output(hidden(input)); }

  ours::LinearReLU hidden;
  theirs::Linear output;
};

std::string printed(const torch::nn::Module& module) {
  std::ostringstream stream;
  stream << module;
  return stream.str();
}

TEST(the_same_seed_gives_the_weights_of_linear) {
  for (const bool bias : {true, false}) {
    const auto options = theirs::LinearOptions(20, 8).bias(bias);
    at::manual_seed(3);
    const ours::LinearReLU one(options);
    at::manual_seed(3);
    const theirs::Linear other(options);
    EXPECT_CLOSE(one->weight, other->weight, 0);
    EXPECT_CLOSE(one->bias, other->bias, 0);
    EXPECT(one->named_parameters().keys() == other->named_parameters().keys());
  }
}

TEST(stock_and_fused_networks_have_the_same_gradients) {
  at::manual_seed(0);
  theirs::Sequential fused(
      {{"hidden", ours::LinearReLU(20, 8).ptr()}, {"output", theirs::Linear(8, 5).ptr()}});
  at::manual_seed(0);
  theirs::Sequential stock({{"hidden", theirs::Linear(20, 8).ptr()},
                            {"relu", theirs::ReLU().ptr()},
                            {"output", theirs::Linear(8, 5).ptr()}});
  const Tensor input = at::randn({30, 20}), target = at::randint(5, {30}, at::kLong);
  const Tensor loss = ours::CrossEntropyLoss()(fused->forward(input), target);
  const Tensor stock_loss = theirs::CrossEntropyLoss()(stock->forward(input), target);
  EXPECT_CLOSE(loss, stock_loss, 1e-6);
  loss.backward();
  stock_loss.backward();
  EXPECT(fused->named_parameters().keys() == stock->named_parameters().keys());
  for (const auto& parameter : stock->named_parameters()) {
    const Tensor found = fused->named_parameters()[parameter.key()].grad();
    EXPECT_CLOSE(found, parameter.value().grad(), 1e-6);
  }
}

TEST(a_module_of_modules) {
  Network network;
  EXPECT(
      network.named_parameters().keys() ==
      std::vector<std::string>({"hidden.weight", "hidden.bias", "output.weight", "output.bias"}));
  EXPECT(network.forward(at::randn({3, 20})).sizes() == at::IntArrayRef({3, 5}));
  network.to(at::kDouble);
  EXPECT(network.forward(at::randn({3, 20}, at::kDouble)).scalar_type() == at::kDouble);
}

TEST(save_and_load) {
  ours::LinearReLU one(20, 8), other(20, 8);
  theirs::Linear stock(20, 8);
  std::stringstream file;
  torch::save(one, file);
  torch::load(other, file);
  EXPECT_CLOSE(other->weight, one->weight, 0);
  EXPECT_CLOSE(other->bias, one->bias, 0);
  file.clear();
  file.seekg(0);
  torch::load(stock, file);
  EXPECT_CLOSE(stock->weight, one->weight, 0);
}

TEST(a_clone_is_of_the_same_kind_and_has_its_own_weights) {
  ours::LinearReLU layer(20, 8);
  const auto clone = std::dynamic_pointer_cast<ours::LinearReLUImpl>(layer->clone());
  EXPECT(clone != nullptr);
  EXPECT_CLOSE(clone->weight, layer->weight, 0);
  EXPECT(clone->weight.data_ptr() != layer->weight.data_ptr());
  const Tensor input = at::randn({3, 20});
  EXPECT_CLOSE(clone->forward(input), layer->forward(input), 0);
  const ours::CrossEntropyLoss loss(ours::CrossEntropyLossOptions().weight(at::rand({5})));
  EXPECT(std::dynamic_pointer_cast<ours::CrossEntropyLossImpl>(loss->clone()) != nullptr);
}

TEST(cross_entropy_loss_takes_the_stock_options) {
  const Tensor logits = at::randn({6, 5}), target = at::randint(5, {6}, at::kLong);
  const auto base = theirs::CrossEntropyLossOptions().weight(at::rand({5})).ignore_index(2);
  for (const auto& options :
       {base, theirs::CrossEntropyLossOptions(base).reduction(torch::kSum),
        theirs::CrossEntropyLossOptions(base).reduction(torch::kNone).label_smoothing(0.3)}) {
    EXPECT_CLOSE(ours::CrossEntropyLoss(options)(logits, target),
                 theirs::CrossEntropyLoss(options)(logits, target), 1e-6);
  }
  EXPECT(ours::CrossEntropyLoss(base)->named_buffers().keys() ==
         std::vector<std::string>{"weight"});
  EXPECT(ours::CrossEntropyLoss()->buffers().empty());
}

TEST(linear_cross_entropy_loss_is_a_head_and_its_loss) {
  const auto options = ours::LinearCrossEntropyLossOptions(20, 5).bias(true).label_smoothing(0.1);
  at::manual_seed(3);
  ours::LinearCrossEntropyLoss fused(options);
  at::manual_seed(3);
  theirs::Linear head(20, 5);
  EXPECT(fused->named_parameters().keys() ==
         std::vector<std::string>({"linear.weight", "linear.bias"}));
  const Tensor input = at::randn({6, 20}), target = at::randint(5, {6}, at::kLong);
  const auto loss_options = theirs::CrossEntropyLossOptions().label_smoothing(0.1);
  const Tensor loss = fused(input, target);
  const Tensor stock_loss = theirs::CrossEntropyLoss(loss_options)(head(input), target);
  EXPECT_CLOSE(loss, stock_loss, 1e-6);
  loss.backward();
  stock_loss.backward();
  EXPECT_CLOSE(fused->linear->weight.grad(), head->weight.grad(), 1e-6);
  EXPECT_CLOSE(fused->linear->bias.grad(), head->bias.grad(), 1e-6);
  const auto clone = std::dynamic_pointer_cast<ours::LinearCrossEntropyLossImpl>(fused->clone());
  EXPECT_CLOSE(clone->forward(input, target), loss, 0);
}

TEST(modules_print_themselves) {
  EXPECT(
      printed(*ours::LinearCrossEntropyLoss(20, 5))
          .rfind("torchext::nn::LinearCrossEntropyLoss(in_features=20, num_classes=5, bias=false)",
                 0) == 0);
  EXPECT(printed(*ours::LinearReLU(20, 8)) ==
         "torchext::nn::LinearReLU(in_features=20, out_features=8, bias=true)");
  EXPECT(printed(*ours::LinearReLU(ours::LinearReLUOptions(2, 3).bias(false))) ==
         "torchext::nn::LinearReLU(in_features=2, out_features=3, bias=false)");
  EXPECT(printed(*ours::CrossEntropyLoss()) == "torchext::nn::CrossEntropyLoss()");
}

}  // namespace
