// Prints the digit that an exported network sees in each test image, one a line. The network is a
// TorchScript file or an AOTInductor package of `torchext train --export torchscript|aoti`.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <cstdio>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "data.h"
#include "options.h"

namespace {

constexpr const char* kUsage = "predict [options] MODEL.ts|MODEL.pt2";

// (N, pixels) to (N, classes)
using Network = std::function<at::Tensor(const at::Tensor&)>;

Network load(const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) data::fail(path, ": no such file");
  try {
    if (std::filesystem::path(path).extension() == ".pt2") {
      const auto package = std::make_shared<torch::inductor::AOTIModelPackageLoader>(path);
      return [package](const at::Tensor& images) { return package->run({images})[0]; };
    }
    const auto module = std::make_shared<torch::jit::Module>(torch::jit::load(path));
    return [module](const at::Tensor& images) { return module->forward({images}).toTensor(); };
  } catch (const std::exception& error) {  // a damaged file can raise almost anything
    const std::string message = error.what();
    data::fail(path,
               ": damaged, or not an exported network: ", message.substr(0, message.find('\n')));
  }
}

int predict(const std::string& path, const std::string& folder) {
  const data::Digits digits = data::load_digits(folder);
  const auto& [sizes, values] = digits.test_images;
  const auto count = static_cast<int64_t>(sizes[0]);
  const auto pixels = static_cast<int64_t>(values.size()) / count;
  const at::Tensor bytes =
      torch::from_blob(const_cast<uint8_t*>(values.data()), {count, pixels}, at::kByte);
  const at::NoGradGuard no_grad;
  const at::Tensor found = load(path)(bytes.to(at::kFloat).div_(255)).argmax(1);
  int64_t right = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto digit = found.const_data_ptr<int64_t>()[i];
    right += digit == digits.test_labels.values[i];
    std::printf("%d\n", static_cast<int>(digit));
  }
  std::fprintf(stderr, "test accuracy %.2f%% on %s images\n", 100.0 * right / count,
               std::to_string(count).c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::string data = "digits";
  try {
    const auto files =
        options::parse(argc, argv, kUsage,
                       {{"--data", "digits|DIR", "where the test images are (default: digits)",
                         [&](const std::string& value) { data = value; }}});
    if (!files) return 0;
    if (files->size() != 1) throw options::Error(std::string("usage: ") + kUsage);
    return predict(files->front(), data);
  } catch (const std::exception& error) {
    const std::string message = error.what();
    std::fprintf(stderr, "predict: error: %s\n", message.substr(0, message.find('\n')).c_str());
    return 2;
  }
}
