// SPDX-License-Identifier: Apache-2.0
#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <limits>
#include <utility>

#include "error.h"

namespace ckpt_fast {

namespace {

constexpr mode_t kCreateMode = 0666;  // the umask takes away what the user does not grant

int64_t align_down(int64_t value) { return value / kDirectAlignment * kDirectAlignment; }
int64_t align_up(int64_t value) { return align_down(value + kDirectAlignment - 1); }

int open_retrying(const std::string& path, int flags) {
  int fd;
  do {
    fd = ::open(path.c_str(), flags | O_CLOEXEC, kCreateMode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

/// Opens with O_DIRECT if asked; `*direct` tells whether it was granted.
Descriptor open_file(const std::string& path, int flags, bool* direct) {
  int fd = -1;
  if (*direct) fd = open_retrying(path, flags | O_DIRECT);
  if (*direct && fd < 0 && errno == EINVAL) *direct = false;
  if (fd < 0 && !*direct) fd = open_retrying(path, flags);
  if (fd < 0) throw_file_error("open", path, errno);
  return Descriptor(fd);
}

void clear_direct(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_DIRECT); }

/// Returns 0 or the errno.
int write_fully(int fd, const uint8_t* data, int64_t nbytes, int64_t offset) {
  while (nbytes > 0) {
    const ssize_t written = ::pwrite(fd, data, static_cast<size_t>(nbytes), offset);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return errno;
    if (written == 0) return EIO;
    data += written;
    nbytes -= written;
    offset += written;
  }
  return 0;
}

}  // namespace

Descriptor::~Descriptor() { close(); }

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  if (this != &other) {
    close();
    fd_ = other.release();
  }
  return *this;
}

int Descriptor::release() { return std::exchange(fd_, -1); }

int Descriptor::close() {
  const int fd = release();
  return fd >= 0 && ::close(fd) != 0 ? errno : 0;
}

OutputFile::OutputFile(std::string path, int64_t nbytes, bool direct) : path_(std::move(path)) {
  file_ = open_file(path_, O_WRONLY | O_CREAT | O_TRUNC, &direct);
  direct_ = direct;
  if (direct) {
    bool buffered = false;
    buffered_ = open_file(path_, O_WRONLY, &buffered);
  }
  // Only a full disk is final here: whatever else fallocate(2) dislikes, the writes will tell if they mind.
  if (nbytes > 0 && ::fallocate(file_.get(), 0, 0, nbytes) != 0 && (errno == ENOSPC || errno == EDQUOT)) {
    throw_write_error(nbytes, 0, path_, errno);
  }
}

int OutputFile::write_direct(const uint8_t* data, int64_t nbytes, int64_t offset) {
  const int64_t aligned = align_down(nbytes);
  int error = write_fully(file_.get(), data, aligned, offset);
  if (error == EINVAL) {  // O_DIRECT was accepted by open(2) only, or wants more than 4096
    direct_ = false;
    clear_direct(file_.get());
    error = write_fully(file_.get(), data, aligned, offset);
  }
  if (error != 0) return error;
  return write_fully(buffered_.get(), data + aligned, nbytes - aligned, offset + aligned);
}

void OutputFile::write(const void* data, int64_t nbytes, int64_t offset) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  const int error = buffered_.is_open() ? write_direct(bytes, nbytes, offset)
                                        : write_fully(file_.get(), bytes, nbytes, offset);
  if (error != 0) throw_write_error(nbytes, offset, path_, error);
}

void OutputFile::sync() {
  int result;
  do {
    result = ::fsync(file_.get());
  } while (result != 0 && errno == EINTR);
  if (result != 0) throw_file_error("fsync", path_, errno);
}

void OutputFile::close() {
  const int first = buffered_.close();
  const int second = file_.close();
  if (first != 0 || second != 0) throw_file_error("close", path_, first != 0 ? first : second);
}

InputFile::InputFile(std::string path, bool direct) : path_(std::move(path)) {
  file_ = open_file(path_, O_RDONLY, &direct);
  direct_ = direct;
  struct stat status;
  if (::fstat(file_.get(), &status) != 0) throw_file_error("stat", path_, errno);
  size_ = S_ISREG(status.st_mode) ? status.st_size : std::numeric_limits<int64_t>::max();
}

void InputFile::read(void* data, int64_t nbytes, int64_t offset) {
  auto* bytes = static_cast<uint8_t*>(data);
  int64_t done = 0;
  while (done < nbytes) {
    const int64_t room = (direct_ ? align_up(nbytes) : nbytes) - done;
    const ssize_t got = ::pread(file_.get(), bytes + done, static_cast<size_t>(room), offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EINVAL && direct_) {
      direct_ = false;
      clear_direct(file_.get());
      continue;
    }
    if (got < 0) throw_read_error(nbytes, offset, path_, errno);
    if (got == 0) throw_file_ends(nbytes, offset, path_, offset + done);
    done += got;
    // A short direct read may stop anywhere; the next one has to start aligned.
    if (direct_ && done < nbytes && got >= kDirectAlignment) done = align_down(done);
  }
}

}  // namespace ckpt_fast
