// SPDX-License-Identifier: Apache-2.0
#include "engine/base/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace ckpt_fast {

void parallel_for(size_t count, int threads, const std::function<void(size_t)>& body,
                  const std::function<void()>& on_error) {
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr first_error;
  std::once_flag first;

  auto work = [&] {
    try {
      for (size_t i = next++; i < count && !failed; i = next++) body(i);
    } catch (...) {
      std::call_once(first, [&] { first_error = std::current_exception(); });
      failed = true;
      if (on_error) on_error();
    }
  };

  std::vector<std::thread> helpers;
  const size_t wanted = std::min(count, static_cast<size_t>(std::max(threads, 1)));
  try {
    helpers.reserve(wanted);
    while (helpers.size() + 1 < wanted) helpers.emplace_back(work);
  } catch (const std::exception&) {
    // No more threads, or no memory for them: the existing ones, at least the caller's, do the work.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  if (first_error) std::rethrow_exception(first_error);
}

}  // namespace ckpt_fast
