// SPDX-License-Identifier: Apache-2.0
// Runs a fuzz target that was built without libFuzzer, with libFuzzer's options:
//
//   TARGET -runs=20000 -seed=1 SEEDS          changes the files of a folder
//   TARGET -max_total_time=600 NEW SEEDS      the first of several folders also gets inputs that reach more
//   TARGET FILE...                            runs these inputs as they are
//
// The target is compiled with -fsanitize-coverage=trace-pc, this file is not. An input that takes an edge of
// the code for the first time, or more often than any before, is changed further. The same program, seeds and
// options lead to the same inputs, as there is one thread. An input has 10 seconds, and may allocate a
// multiple of its length. The one that ends the process is written to a file.
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "fuzz/mutations.h"

extern "C" {
int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
__attribute__((weak)) size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                                     unsigned seed);
extern const char __executable_start;

// Of the sanitizers' run time; GCC does not always come with its headers.
void __sanitizer_set_death_callback(void (*callback)());
int __sanitizer_install_malloc_and_free_hooks(void (*on_malloc)(const volatile void*, size_t),
                                              void (*on_free)(const volatile void*));
}

namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr unsigned kTimeoutS = 10;
constexpr size_t kFreeNbytes = 64 << 20;
constexpr size_t kNbytesPerByte = 512;
constexpr size_t kLongestInput = 64 << 10;
constexpr size_t kEdges = 1 << 16;
constexpr size_t kMostDoublings = 4;  // of the number of changes
constexpr auto kReportEvery = std::chrono::minutes(1);

uint8_t hits[kEdges];  // by the current input
size_t previous = 0;
const Bytes* current = nullptr;
size_t allocated = 0;  // by the current input, whether freed or not
Random* choices = nullptr;

void write_input(const std::string& prefix, const Bytes& input) {
  uint64_t hash = 0xCBF29CE484222325;  // FNV-1a
  for (const uint8_t byte : input) hash = (hash ^ byte) * 0x100000001B3;
  char name[17];
  std::snprintf(name, sizeof name, "%016llx", static_cast<unsigned long long>(hash));
  std::ofstream stream(prefix + name, std::ios::binary);
  stream.write(reinterpret_cast<const char*>(input.data()), static_cast<std::streamsize>(input.size()));
}

void keep_what_kills() {
  if (current == nullptr) return;
  write_input("crash-", *current);
  std::fprintf(stderr, "the input, %zu bytes, is kept as crash-*\n", current->size());
}

void end_what_takes_long(int) {
  std::fprintf(stderr, "an input takes longer than %u s\n", kTimeoutS);
  std::abort();
}

void count_allocation(const volatile void*, size_t nbytes) {
  if (current == nullptr) return;
  allocated += nbytes;
  if (allocated <= kFreeNbytes + kNbytesPerByte * current->size()) return;
  std::fprintf(stderr, "an input of %zu bytes allocates %zu bytes\n", current->size(), allocated);
  std::abort();
}

/// Runs the target on a copy, behind which no memory is.
void run(const Bytes& input) {
  auto* const copy = static_cast<uint8_t*>(std::malloc(input.size()));
  std::copy(input.begin(), input.end(), copy);
  std::memset(hits, 0, sizeof hits);
  previous = allocated = 0;
  current = &input;
  alarm(kTimeoutS);
  LLVMFuzzerTestOneInput(copy, input.size());
  alarm(0);
  current = nullptr;
  std::free(copy);
}

/// How often each edge was taken at most: one bit for each power of two.
class Coverage {
 public:
  /// Adds what the last input took; returns whether any of it is new.
  bool add() {
    bool is_new = false;
    for (size_t edge = 0; edge < kEdges; ++edge) {
      if (hits[edge] == 0) continue;
      const auto bit = static_cast<uint8_t>(1u << (31 - __builtin_clz(hits[edge])));
      if ((seen_[edge] & bit) != 0) continue;
      edges_ += seen_[edge] == 0;
      seen_[edge] |= bit;
      is_new = true;
    }
    return is_new;
  }

  size_t edges() const { return edges_; }

 private:
  uint8_t seen_[kEdges] = {};
  size_t edges_ = 0;
};

struct Options {
  uint64_t runs = 0;  // 0: without end
  uint64_t seconds = 0;
  uint64_t seed = 1;
  std::vector<fs::path> paths;

  Options(int count, char** arguments) {
    for (int i = 1; i < count; ++i) {
      const std::string argument = arguments[i];
      const auto number = [&](const char* name, uint64_t* value) {
        const size_t length = std::strlen(name);
        if (argument.compare(0, length, name) != 0) return false;
        *value = std::stoull(argument.substr(length));
        return true;
      };
      if (number("-runs=", &runs) || number("-max_total_time=", &seconds) || number("-seed=", &seed))
        continue;
      paths.emplace_back(argument);
    }
  }
};

Bytes content_of(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream.good()) {
    std::fprintf(stderr, "%s cannot be read\n", path.c_str());
    std::exit(2);
  }
  return {std::istreambuf_iterator<char>(stream), {}};
}

class Campaign {
 public:
  explicit Campaign(const Options& options) : options_(options), random_(options.seed) { choices = &random_; }

  void start() {
    for (const fs::path& folder : options_.paths) {
      std::vector<fs::path> paths(fs::directory_iterator(folder), {});
      std::sort(paths.begin(), paths.end());
      for (const fs::path& path : paths) try_input(content_of(path));
    }
    seeds_ = corpus_.size();
    if (seeds_ == 0) corpus_.emplace_back();
  }

  void go_on() {
    auto next_report = begin_ + kReportEvery;
    while ((options_.runs == 0 || inputs_ < options_.runs) &&
           (options_.seconds == 0 || Clock::now() < begin_ + std::chrono::seconds(options_.seconds))) {
      try_input(changed());
      if (Clock::now() < next_report) continue;
      report("so far");
      next_report += kReportEvery;
    }
  }

  void report(const char* state) const {
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(Clock::now() - begin_).count();
    std::printf("%s: %zu inputs in %lld s, %zu edges, %zu kept, %zu of them seeds\n", state, inputs_,
                static_cast<long long>(seconds), coverage_.edges(), corpus_.size(), seeds_);
    std::fflush(stdout);
  }

 private:
  void try_input(Bytes input) {
    if (input.size() > kLongestInput) input.resize(kLongestInput);
    run(input);
    ++inputs_;
    if (!coverage_.add()) return;
    if (seeds_ > 0 && options_.paths.size() > 1) write_input(options_.paths.front().string() + "/", input);
    corpus_.push_back(std::move(input));
  }

  Bytes changed() {
    // Every other time one of the last: what they reach was not looked at for long.
    const size_t newest = below(random_, 2) == 0 ? std::min<size_t>(corpus_.size(), 64) : corpus_.size();
    Bytes input = corpus_[corpus_.size() - 1 - below(random_, newest)];
    for (size_t changes = size_t{1} << below(random_, kMostDoublings); changes > 0; --changes) {
      if (below(random_, 16) == 0) {
        splice(random_, corpus_[below(random_, corpus_.size())], &input);
      } else if (LLVMFuzzerCustomMutator == nullptr) {
        mutate(random_, &input);
      } else {
        const size_t size = input.size();
        input.resize(kLongestInput);
        const auto seed = static_cast<unsigned>(random_());
        input.resize(
            LLVMFuzzerCustomMutator(input.data(), std::min(size, kLongestInput), kLongestInput, seed));
      }
    }
    return input;
  }

  const Options& options_;
  Random random_;
  Coverage coverage_;
  std::vector<Bytes> corpus_;
  size_t seeds_ = 0;
  size_t inputs_ = 0;
  const Clock::time_point begin_ = Clock::now();
};

}  // namespace

extern "C" {

/// Called by the target at the beginning of each basic block.
void __sanitizer_cov_trace_pc() {
  const auto place = reinterpret_cast<uintptr_t>(__builtin_return_address(0)) -
                     reinterpret_cast<uintptr_t>(&__executable_start);
  const size_t block = place * 0x9E3779B97F4A7C15 >> 48;
  uint8_t& hit = hits[(block ^ previous) % kEdges];
  if (hit < 0xFF) ++hit;
  previous = block >> 1;
}

const char* __asan_default_options() {
  return "handle_abort=1:allocator_may_return_null=0:max_allocation_size_mb=512";
}

/// The engine does without.
int pthread_create(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*) { return EAGAIN; }

/// For custom mutators.
size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size) {
  Bytes input(data, data + size);
  mutate(*choices, &input);
  size = std::min(input.size(), max_size);
  std::copy_n(input.begin(), size, data);
  return size;
}
}

int main(int count, char** arguments) {
  __sanitizer_set_death_callback(keep_what_kills);
  __sanitizer_install_malloc_and_free_hooks(count_allocation, [](const volatile void*) {});
  std::signal(SIGALRM, end_what_takes_long);
  const Options options(count, arguments);
  if (std::all_of(options.paths.begin(), options.paths.end(),
                  [](const fs::path& path) { return fs::is_regular_file(path); })) {
    for (const fs::path& path : options.paths) run(content_of(path));
    return 0;
  }
  Campaign campaign(options);
  campaign.start();
  campaign.go_on();
  campaign.report(fs::path(arguments[0]).filename().c_str());
  return 0;
}
