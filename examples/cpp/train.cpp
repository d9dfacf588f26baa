// Trains 784-64-10 on handwritten digits with LibTorch, as `torchext train` does in Python: the
// same options, start, batches and arithmetic, and so the same losses.
#include <torch/torch.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <string>
#include <vector>

#include "data.h"
#include "options.h"
#include "run_folder.h"
#include "trainer.h"

namespace {

using options::Settings;
using Clock = std::chrono::steady_clock;

volatile std::sig_atomic_t interrupted = 0;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// "1,437"
std::string with_commas(int64_t number) {
  std::string text = std::to_string(number);
  for (int i = static_cast<int>(text.size()) - 3; i > 0; i -= 3) text.insert(i, 1, ',');
  return text;
}

// The steps done, on a terminal; else nothing.
class Progress {
 public:
  explicit Progress(int64_t total) : total_(total), terminal_(isatty(STDERR_FILENO) == 1) {}
  ~Progress() { clear(); }

  void tick() {
    ++done_;
    if (!terminal_ || Clock::now() < next_) return;
    next_ = Clock::now() + std::chrono::milliseconds(100);
    std::fprintf(stderr, "\r%3.0f%%  %s of %s steps, %.0f steps/s ", 100.0 * done_ / total_,
                 with_commas(done_).c_str(), with_commas(total_).c_str(),
                 done_ / seconds_since(start_));
  }

  void clear() const {
    if (terminal_) std::fputs("\r\033[K", stderr);
  }

 private:
  int64_t total_, done_ = 0;
  bool terminal_;
  Clock::time_point start_ = Clock::now(), next_ = start_;
};

int complain(const std::string& message, int code) {
  std::fprintf(stderr, "train: %s\n", message.c_str());
  return code;
}

void settle(Settings& settings) {
  if (settings.data != "digits") {
    settings.data = std::filesystem::weakly_canonical(settings.data).string();
  }
  const bool cuda = torch::cuda::is_available();
  if (settings.device == "cuda" && !cuda) {
    throw options::Error("--device cuda: LibTorch " TORCH_VERSION " finds no CUDA device");
  }
  if (settings.device == "auto") settings.device = cuda ? "cuda" : "cpu";
}

void introduce(const Settings& settings, const data::Digits& digits, const Trainer& trainer) {
  const std::string threads =
      settings.device == "cpu" ? " (" + std::to_string(at::get_num_threads()) + " threads)" : "";
  std::printf("784-64-10, %s, on %s%s: %s images to train on, %s to test on, %s steps an epoch\n",
              settings.model.c_str(), settings.device.c_str(), threads.c_str(),
              with_commas(trainer.batches.samples()).c_str(),
              with_commas(static_cast<int64_t>(digits.test_labels.sizes[0])).c_str(),
              std::to_string(trainer.batches.steps()).c_str());
  std::printf("%5s%12s%12s%11s%12s\n", "epoch", "loss", "test acc.", "seconds", "images/s");
  std::fflush(stdout);
}

// What there is to save: always the end of an epoch, whenever Ctrl-C comes.
struct State {
  std::vector<Epoch> epochs;
  Weights weights;
};

int finish(const Settings& settings, const State& state, double seconds, const std::string& error) {
  const size_t done = state.epochs.size();
  if (done > 0) {
    const std::filesystem::path out = settings.out;
    save_weights(out / "weights.pt", state.weights);
    replace_file(out / "metrics.json", metrics(settings, state.epochs));
    std::printf(
        "test accuracy %.2f%% after %zu of %s epochs, %.1f s; in %s: metrics.json, weights.pt\n",
        100 * state.epochs.back().test_accuracy, done, std::to_string(settings.epochs).c_str(),
        seconds, settings.out.c_str());
    std::fflush(stdout);
  }
  if (!error.empty()) return complain(error, 1);
  if (!interrupted) return 0;
  return complain(done == 0 ? "interrupted before the end of an epoch: nothing is saved"
                            : "interrupted, saved after epoch " + std::to_string(done),
                  130);
}

int train(const Settings& settings) {
  const data::Digits digits = data::load_digits(settings.data);
  const uint64_t pixels = digits.train_images.sizes[1] * digits.train_images.sizes[2];
  if (pixels != kPixels)
    data::fail("--data ", settings.data, ": expected images of ", kPixels, " pixels, got ", pixels);
  Trainer trainer(digits, {settings.model, settings.batch_size, settings.lr, settings.momentum,
                           settings.seed, at::Device(settings.device)});
  if (!settings.weights.empty()) load_weights(settings.weights, *trainer.network);
  std::filesystem::create_directories(settings.out);
  introduce(settings, digits, trainer);

  State state;
  std::string error;
  const Clock::time_point start = Clock::now();
  Progress progress(settings.epochs * trainer.batches.steps());
  std::signal(SIGINT, [](int) { interrupted = 1; });
  for (int64_t epoch = 1; epoch <= settings.epochs; ++epoch) {
    const Clock::time_point begin = Clock::now();
    const double loss = trainer.train_epoch(epoch, [&] {
      progress.tick();
      return !interrupted;
    });
    const double seconds = seconds_since(begin);
    if (interrupted) break;
    if (!std::isfinite(loss)) {
      error = "error: the loss became " + std::string(std::isnan(loss) ? "nan" : "inf") +
              " in epoch " + std::to_string(epoch) + ": try a smaller --lr";
      break;
    }
    const double right = trainer.test_accuracy();
    state.epochs.push_back({epoch, loss, right, seconds});
    state.weights = copy_weights(*trainer.network);
    progress.clear();
    std::printf("%5s%12.6f%11.2f%%%11.3f%12s\n", std::to_string(epoch).c_str(), loss, 100 * right,
                seconds,
                with_commas(std::llround(static_cast<double>(trainer.batches.samples()) / seconds))
                    .c_str());
    std::fflush(stdout);
  }
  progress.clear();
  return finish(settings, state, seconds_since(start), error);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Settings settings;
    const auto rest = options::parse(argc, argv, "train [options]", train_options(settings));
    if (!rest) return 0;
    if (!rest->empty()) throw options::Error("unrecognized arguments: " + rest->front());
    settle(settings);
    return train(settings);
  } catch (const c10::Error& error) {
    return complain(std::string("error: ") + error.what_without_backtrace(), 2);
  } catch (const std::filesystem::filesystem_error& error) {
    return complain("error: " + error.path1().string() + ": " + error.code().message(), 2);
  } catch (const std::exception& error) {
    return complain(std::string("error: ") + error.what(), 2);
  }
}
