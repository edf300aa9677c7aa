// SPDX-License-Identifier: Apache-2.0
// The engine's errors: SystemError for what the operating system refused, std::invalid_argument for
// requests that make no sense (raised before any file is touched).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ckpt_fast {

/// A failed system call. what() is complete, e.g.
/// "write 4194304 bytes at 12288 to PATH: No space left on device".
class SystemError : public std::runtime_error {
 public:
  SystemError(const std::string& text, int error_number, std::string path);

  int error_number() const noexcept { return error_number_; }
  const std::string& path() const noexcept { return path_; }

 private:
  int error_number_;
  std::string path_;
};

/// Throws "VERB PATH: reason".
[[noreturn]] void throw_file_error(const char* verb, const std::string& path, int error_number);

/// Throws "VERB PATH: it is a FIFO, not a regular file" with errno EIO; for a directory, its reason and
/// EISDIR.
[[noreturn]] void throw_not_regular(const char* verb, const std::string& path, uint32_t mode);

/// Throws "write NBYTES bytes at OFFSET to PATH: reason".
[[noreturn]] void throw_write_error(int64_t nbytes, int64_t offset, const std::string& path,
                                    int error_number);

/// Throws "read NBYTES bytes at OFFSET from PATH: reason".
[[noreturn]] void throw_read_error(int64_t nbytes, int64_t offset, const std::string& path, int error_number);

/// Throws "read NBYTES bytes at OFFSET from PATH: file ends at SIZE" with errno EIO.
[[noreturn]] void throw_file_ends(int64_t nbytes, int64_t offset, const std::string& path, int64_t size);

}  // namespace ckpt_fast
