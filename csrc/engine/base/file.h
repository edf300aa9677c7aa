// SPDX-License-Identifier: Apache-2.0
// Files opened for one job: whole transfers at given positions, past the page cache where possible.
// Every failure is a SystemError that names the transfer and the path.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ckpt_fast {

/// The alignment of addresses, offsets and sizes for direct I/O.
constexpr int64_t kDirectAlignment = 4096;

/// Owns a file descriptor.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor();
  Descriptor(Descriptor&& other) noexcept : fd_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept;

  int get() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }
  int release();
  /// Closes and returns the errno of close(2), 0 when all is well.
  int close();

 private:
  int fd_ = -1;
};

/// A file being created under a unique name: ".NAME.<8 hex digits>.partial" beside `path`. Nothing is ever
/// opened for writing under a name that others may use. Threads may write different ranges concurrently.
class OutputFile {
 public:
  /// Creates the file and reserves `nbytes`, so that a full disk is noticed before anything is written.
  /// `direct` requests O_DIRECT; a file system that refuses it, or lives in memory, gets buffered writes.
  OutputFile(std::string path, int64_t nbytes, bool direct);
  /// Removes the file unless it was published.
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  /// Writes all of a range of `nbytes`, the concatenation of `parts`. In direct mode there is one part, whose
  /// address, like `offset`, is a multiple of kDirectAlignment; bytes after its last multiple go through the
  /// page cache.
  void write(std::vector<iovec> parts, int64_t nbytes, int64_t offset);

  void sync();
  void close();
  /// Renames the closed file to `path`, replacing any file there.
  void publish();
  bool direct() const { return direct_; }

 private:
  void prepare(int64_t nbytes, bool direct);
  int write_direct(const iovec& part, int64_t offset);

  std::string path_;
  std::string partial_;  // "" once published
  bool synced_ = false;
  Descriptor file_;
  Descriptor buffered_;  // a second view of a direct file, for what direct I/O cannot write
  std::atomic<bool> direct_{false};
};

/// A file being read. Threads may read different ranges concurrently.
class InputFile {
 public:
  /// Opens a regular file, or a link to one. Anything else is an error, without blocking.
  InputFile(std::string path, bool direct);

  int64_t size() const { return size_; }

  /// Reads a range of `nbytes` into `parts`, which have room for it. In direct mode there is one part, and
  /// its address, its size and `offset` are multiples of kDirectAlignment.
  void read(std::vector<iovec> parts, int64_t nbytes, int64_t offset);

  bool direct() const { return direct_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  Descriptor file_;
  int64_t size_ = 0;
  bool opened_direct_ = false;
  std::atomic<bool> direct_{false};
};

/// Returns the size of a regular file without opening it; errors are those of opening it.
int64_t regular_file_size(const std::string& path);

}  // namespace ckpt_fast
