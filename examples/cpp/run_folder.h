// What a training leaves in its folder: metrics.json and weights.pt.
#pragma once

#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/csrc/jit/serialization/pickler.h>
#include <torch/torch.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "data.h"
#include "options.h"

using Weights = c10::Dict<std::string, at::Tensor>;

struct Epoch {
  int64_t epoch;
  double loss;
  double test_accuracy;  // 0 to 1
  double seconds;        // of training, without the test
};

// Writes a file beside `path`, then puts it in its place in one step.
inline void replace_file(const std::filesystem::path& path, const std::string& contents) {
  std::filesystem::path beside = path;
  beside += ".tmp";
  std::ofstream file(beside, std::ios::binary);
  file << contents;
  file.close();
  if (!file) throw std::runtime_error(beside.string() + ": cannot be written");
  std::filesystem::rename(beside, path);
}

inline std::string json(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      quoted += escape;
    } else {
      quoted += c;
    }
  }
  return quoted + "\"";
}

// The shortest text that reads back as the same number, and as a number with a fraction.
inline std::string json(double value) {
  const std::string text = options::shown(value);
  return text.find_first_of(".e") == std::string::npos ? text + ".0" : text;
}

inline std::string metrics(const options::Settings& settings, const std::vector<Epoch>& epochs) {
  const auto line = [](const std::string& name, const std::string& value) {
    return "    \"" + name + "\": " + value;
  };
  std::string text =
      "{\n  \"settings\": {\n" + line("data", json(settings.data)) + ",\n" +
      line("epochs", std::to_string(settings.epochs)) + ",\n" +
      line("batch_size", std::to_string(settings.batch_size)) + ",\n" +
      line("lr", json(settings.lr)) + ",\n" + line("momentum", json(settings.momentum)) + ",\n" +
      line("seed", std::to_string(settings.seed)) + ",\n" + line("out", json(settings.out)) +
      ",\n" + line("model", json(settings.model)) + ",\n" + line("device", json(settings.device));
  if (!settings.weights.empty()) text += ",\n" + line("weights", json(settings.weights));
  text += "\n  },\n  \"epochs\": [";
  for (const Epoch& row : epochs) {
    text += &row == epochs.data() ? "\n" : ",\n";
    text += "    {\"epoch\": " + std::to_string(row.epoch) + ", \"loss\": " + json(row.loss) +
            ", \"test_accuracy\": " + json(row.test_accuracy) +
            ", \"seconds\": " + json(row.seconds) + "}";
  }
  return text + "\n  ]\n}\n";
}

// The network's parameters by name, copied to the CPU.
inline Weights copy_weights(const torch::nn::Module& network) {
  Weights weights;
  for (const auto& parameter : network.named_parameters()) {
    weights.insert(parameter.key(),
                   parameter.value().detach().to(at::kCPU, at::kFloat, false, true));
  }
  return weights;
}

// Writes what `torch.load` reads in Python. torch::pickle_save would do, but it marks each
// dictionary with its type, by a function that weights_only=True refuses to call.
inline void save_weights(const std::filesystem::path& path, const Weights& weights) {
  std::string pickle, file;
  torch::jit::Pickler pickler([&](const char* bytes, size_t size) { pickle.append(bytes, size); },
                              /*tensor_table=*/nullptr, /*type_renamer=*/nullptr,
                              /*memoized_class_types=*/nullptr, /*get_tensor_id=*/nullptr,
                              /*tag_aggregates=*/false);
  pickler.protocol();
  pickler.pushIValue(weights);
  pickler.stop();
  caffe2::serialize::PyTorchStreamWriter writer([&](const void* bytes, size_t size) {
    file.append(static_cast<const char*>(bytes), size);
    return size;
  });
  writer.writeRecord("data.pkl", pickle.data(), pickle.size());
  size_t number = 0;
  for (const at::Tensor& tensor : pickler.tensorData()) {
    const auto data = torch::jit::getWriteableTensorData(tensor);
    writer.writeRecord("data/" + std::to_string(number++), data.data(), data.sizeInBytes());
  }
  writer.writeEndOfFile();
  replace_file(path, file);
}

// Sets the parameters to those in a file that this program or Python's torch.save wrote.
inline void load_weights(const std::filesystem::path& path, torch::nn::Module& network) {
  const data::Bytes bytes = data::read_file(path);
  c10::IValue loaded;
  try {
    loaded = torch::pickle_load(std::vector<char>(bytes.begin(), bytes.end()));
  } catch (const std::exception&) {  // a damaged file can raise almost anything
    data::fail(path.string(), ": damaged, or not a file of weights");
  }
  if (!loaded.isGenericDict()) data::fail(path.string(), ": not a dictionary of weights");
  const auto weights = loaded.toGenericDict();
  const at::NoGradGuard no_grad;
  for (auto& parameter : network.named_parameters()) {
    const auto found = weights.find(parameter.key());
    if (found == weights.end() || !found->value().isTensor())
      data::fail(path.string(), ": it has no tensor ", parameter.key());
    const at::Tensor value = found->value().toTensor();
    if (value.sizes() != parameter.value().sizes())
      data::fail(path.string(), ": ", parameter.key(), " has shape ", value.sizes(),
                 ", the network's has ", parameter.value().sizes());
    parameter.value().copy_(value);
  }
}
