// SPDX-License-Identifier: Apache-2.0
// Threads that live for one call. A transfer takes milliseconds or more, starting a thread tens of
// microseconds; and no threads are left that a fork would silently lose.
#pragma once

#include <cstddef>
#include <functional>

namespace ckpt_fast {

/// Runs body(0) … body(count - 1) on up to `threads` threads, including the caller's; indices are taken in
/// order. If a body throws, no further index is taken, `on_error` is called (to wake bodies that wait for
/// each other), and the first exception is rethrown here after every thread has returned.
void parallel_for(size_t count, int threads, const std::function<void(size_t)>& body,
                  const std::function<void()>& on_error = {});

}  // namespace ckpt_fast
