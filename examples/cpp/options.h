// The command line: the options of `torchext train`, with its defaults, checks and messages.
#pragma once

#include <charconv>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iostream>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace options {

// A wrong option. The message is for the user.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Settings {
  std::string data = "digits";
  int64_t epochs = 30;
  int64_t batch_size = 100;
  double lr = 0.02;
  double momentum = 0.9;
  int64_t seed = 0;
  std::string out = "runs/train-cpp";
  std::string model = "fused";
  std::string device = "auto";
  std::string weights;  // a file to start from; empty: fresh weights
};

struct Option {
  std::string name;     // "--lr"
  std::string metavar;  // "X"
  std::string help;
  std::function<void(const std::string& value)> set;
};

inline int64_t whole(const std::string& text, int64_t low, int64_t high = 2147483647) {
  int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || value < low || value > high)
    throw Error("expected a whole number from " + std::to_string(low) + " to " +
                std::to_string(high) + ", got '" + text + "'");
  return value;
}

inline double number(const std::string& text, const std::function<bool(double)>& valid,
                     const std::string& expected) {
  double value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || !std::isfinite(value) || !valid(value))
    throw Error("expected " + expected + ", got '" + text + "'");
  return value;
}

inline std::string choice(const std::string& text, const std::vector<std::string>& choices) {
  std::string list;
  for (const std::string& name : choices) {
    if (name == text) return text;
    list += (list.empty() ? "'" : ", '") + name + "'";
  }
  throw Error("invalid choice: '" + text + "' (choose from " + list + ")");
}

inline std::string shown(double value) {
  std::string text(32, '\0');
  text.resize(std::to_chars(text.data(), text.data() + text.size(), value).ptr - text.data());
  return text;
}

inline std::vector<Option> train_options(Settings& settings) {
  const Settings defaults;
  const auto text = [](std::string help, const std::string& value) {
    return help + " (default: " + value + ")";
  };
  return {
      {"--data", "digits|DIR",
       text("digits, the 1,797 handwritten digits that come with torchext, or a folder with "
            "MNIST's four files",
            defaults.data),
       [&](const std::string& value) { settings.data = value; }},
      {"--epochs", "N", text("passes over the data", std::to_string(defaults.epochs)),
       [&](const std::string& value) { settings.epochs = whole(value, 1); }},
      {"--batch-size", "N", text("images in a step", std::to_string(defaults.batch_size)),
       [&](const std::string& value) { settings.batch_size = whole(value, 1); }},
      {"--lr", "X", text("learning rate of SGD", shown(defaults.lr)),
       [&](const std::string& value) {
         settings.lr = number(value, [](double x) { return x > 0; }, "a number above 0");
       }},
      {"--momentum", "X", text("momentum of SGD", shown(defaults.momentum)),
       [&](const std::string& value) {
         settings.momentum = number(
             value, [](double x) { return 0 <= x && x < 1; }, "a number from 0 up to 1, without 1");
       }},
      // PyTorch's generator uses 32 bits of a seed.
      {"--seed", "N", text("of the weights and batches", std::to_string(defaults.seed)),
       [&](const std::string& value) { settings.seed = whole(value, 0, 4294967295); }},
      {"--out", "DIR", text("folder for the results", defaults.out),
       [&](const std::string& value) { settings.out = value; }},
      {"--model", "fused|stock", text("torchext's layers or LibTorch's", defaults.model),
       [&](const std::string& value) { settings.model = choice(value, {"fused", "stock"}); }},
      {"--device", "auto|cpu|cuda", text("where to train", defaults.device),
       [&](const std::string& value) { settings.device = choice(value, {"auto", "cpu", "cuda"}); }},
      {"--weights", "FILE", "start from these weights: a weights.pt of this program or Python's",
       [&](const std::string& value) { settings.weights = value; }},
  };
}

inline void print_help(const std::string& usage, const std::vector<Option>& options) {
  std::cout << "usage: " << usage << "\n\noptions:\n  --help\n";
  for (const Option& option : options) {
    std::cout << "  " << option.name << " " << option.metavar << "\n        " << option.help
              << "\n";
  }
}

// Sets what the arguments say and returns those that are no options, in order; nothing if help was
// asked for and given. `--name value` and `--name=value` are the same.
inline std::optional<std::vector<std::string>> parse(int argc, char** argv,
                                                     const std::string& usage,
                                                     const std::vector<Option>& options) {
  std::vector<std::string> positional;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--help" || argument == "-h") {
      print_help(usage, options);
      return std::nullopt;
    }
    if (argument.rfind("-", 0) != 0) {
      positional.push_back(argument);
      continue;
    }
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    const Option* found = nullptr;
    for (const Option& option : options) {
      if (option.name == name) found = &option;
    }
    if (found == nullptr) throw Error("unrecognized arguments: " + argument);
    std::string value;
    if (equals != std::string::npos) {
      value = argument.substr(equals + 1);
    } else if (i + 1 < argc && std::string_view(argv[i + 1]).rfind("--", 0) != 0) {
      value = argv[++i];
    } else {
      throw Error("argument " + name + ": expected one argument");
    }
    try {
      found->set(value);
    } catch (const Error& error) {
      throw Error("argument " + name + ": " + error.what());
    }
  }
  return positional;
}

}  // namespace options
