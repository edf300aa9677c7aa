// SPDX-License-Identifier: Apache-2.0
#include "engine/base/file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <limits>
#include <utility>

#include "engine/base/error.h"

namespace ckpt_fast {

namespace {

constexpr mode_t kCreateMode = 0666;  // restricted by the umask
constexpr int kNamesTried = 100;

int64_t align_down(int64_t value) { return value / kDirectAlignment * kDirectAlignment; }

int open_retrying(const std::string& path, int flags) {
  int fd;
  do {
    fd = ::open(path.c_str(), flags | O_CLOEXEC, kCreateMode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

/// Whether a file system reports that it does not support direct I/O, or not in this form.
bool refuses_direct(int error) { return error == EINVAL || error == EOPNOTSUPP; }

/// Opens with O_DIRECT if requested; `*direct` returns whether it was granted.
Descriptor open_file(const std::string& path, int flags, bool* direct) {
  int fd = -1;
  if (*direct) fd = open_retrying(path, flags | O_DIRECT);
  if (*direct && fd < 0 && refuses_direct(errno)) *direct = false;
  if (fd < 0 && !*direct) fd = open_retrying(path, flags);
  if (fd < 0) throw_file_error("open", path, errno);
  return Descriptor(fd);
}

std::string partial_name(const std::string& path) {
  uint32_t number = 0;
  // Without random bytes, early during boot, any number will do: an existing file is never opened.
  if (::getrandom(&number, sizeof number, GRND_NONBLOCK) < 0) number = static_cast<uint32_t>(::getpid());
  char suffix[sizeof ".01234567.partial"];
  std::snprintf(suffix, sizeof suffix, ".%08x.partial", number);
  const size_t name = path.rfind('/') + 1;  // 0 without a directory
  return path.substr(0, name) + "." + path.substr(name) + suffix;
}

/// Creates a file under an unused name; `*direct` as for open_file.
Descriptor create_file(const std::string& path, bool* direct, std::string* partial) {
  for (int tried = 1;; ++tried) {
    *partial = partial_name(path);
    const int fd = open_retrying(*partial, O_WRONLY | O_CREAT | O_EXCL | (*direct ? O_DIRECT : 0));
    if (fd >= 0) return Descriptor(fd);
    const int error = errno;
    if (*direct && refuses_direct(error)) {
      ::unlink(partial->c_str());  // it may have been created before O_DIRECT was rejected
      *direct = false;
    } else if (error != EEXIST || tried == kNamesTried) {
      partial->clear();
      throw_file_error("open", path, error);
    }
  }
}

void clear_direct(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_DIRECT); }

/// True for file systems whose files are page cache and nothing else: they may accept O_DIRECT, but there is
/// nothing to bypass, and reserving space there means clearing pages that are about to be overwritten.
bool is_in_memory(int fd) {
  struct statfs status;
  return ::fstatfs(fd, &status) == 0 && (status.f_type == TMPFS_MAGIC || status.f_type == RAMFS_MAGIC);
}

/// Takes `nbytes` off the front of parts[*first …].
void drop_front(std::vector<iovec>* parts, size_t* first, size_t nbytes) {
  while (*first < parts->size() && nbytes >= (*parts)[*first].iov_len) nbytes -= (*parts)[(*first)++].iov_len;
  if (nbytes == 0) return;
  iovec& part = (*parts)[*first];
  part.iov_base = static_cast<uint8_t*>(part.iov_base) + nbytes;
  part.iov_len -= nbytes;
}

/// Returns 0 or the errno.
int write_fully(int fd, std::vector<iovec> parts, int64_t offset) {
  for (size_t first = 0; first < parts.size();) {
    const auto count = static_cast<int>(std::min<size_t>(parts.size() - first, IOV_MAX));
    const ssize_t written = ::pwritev(fd, parts.data() + first, count, offset);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return errno;
    if (written == 0) return EIO;
    drop_front(&parts, &first, static_cast<size_t>(written));
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
  file_ = create_file(path_, &direct, &partial_);
  try {
    prepare(nbytes, direct);
  } catch (...) {
    ::unlink(partial_.c_str());  // the destructor will not run
    throw;
  }
}

OutputFile::~OutputFile() {
  if (!partial_.empty()) ::unlink(partial_.c_str());
}

void OutputFile::prepare(int64_t nbytes, bool direct) {
  if (is_in_memory(file_.get())) {
    clear_direct(file_.get());
    return;
  }
  direct_ = direct;
  if (direct) {
    bool buffered = false;
    buffered_ = open_file(partial_, O_WRONLY, &buffered);
  }
  // Only a full disk is final here: other fallocate(2) errors matter only if the writes fail too.
  if (nbytes > 0 && ::fallocate(file_.get(), 0, 0, nbytes) != 0 && (errno == ENOSPC || errno == EDQUOT)) {
    throw_write_error(nbytes, 0, path_, errno);
  }
}

int OutputFile::write_direct(const iovec& part, int64_t offset) {
  const int64_t aligned = align_down(static_cast<int64_t>(part.iov_len));
  const std::vector<iovec> head = {{part.iov_base, static_cast<size_t>(aligned)}};
  int error = aligned > 0 ? write_fully(file_.get(), head, offset) : 0;
  if (refuses_direct(error)) {  // only open(2) accepted O_DIRECT, or it needs more than 4096
    clear_direct(file_.get());
    direct_ = false;
    error = write_fully(file_.get(), head, offset);
  }
  const size_t rest = part.iov_len - static_cast<size_t>(aligned);
  if (error != 0 || rest == 0) return error;
  return write_fully(buffered_.get(), {{static_cast<uint8_t*>(part.iov_base) + aligned, rest}},
                     offset + aligned);
}

void OutputFile::write(std::vector<iovec> parts, int64_t nbytes, int64_t offset) {
  const int error = buffered_.is_open() && parts.size() == 1
                        ? write_direct(parts.front(), offset)
                        : write_fully(file_.get(), std::move(parts), offset);
  if (error != 0) throw_write_error(nbytes, offset, path_, error);
}

void OutputFile::sync() {
  int result;
  do {
    result = ::fsync(file_.get());
  } while (result != 0 && errno == EINTR);
  if (result != 0) throw_file_error("fsync", path_, errno);
  synced_ = true;
}

void OutputFile::close() {
  for (Descriptor* const descriptor : {&buffered_, &file_}) {
    const int error = descriptor->close();
    // An interrupted close(2) has closed the file, but may have lost data that was not synced.
    if (error != 0 && !(error == EINTR && synced_)) throw_file_error("close", path_, error);
  }
}

void OutputFile::publish() {
  if (::rename(partial_.c_str(), path_.c_str()) != 0) throw_file_error("rename", path_, errno);
  partial_.clear();
}

InputFile::InputFile(std::string path, bool direct) : path_(std::move(path)) {
  // This way, opening a FIFO does not block until it has a writer.
  file_ = open_file(path_, O_RDONLY | O_NONBLOCK, &direct);
  struct stat status;
  if (::fstat(file_.get(), &status) != 0) throw_file_error("stat", path_, errno);
  if (!S_ISREG(status.st_mode)) throw_not_regular("open", path_, status.st_mode);
  size_ = status.st_size;
  direct_ = opened_direct_ = direct && !is_in_memory(file_.get());
  if (!direct_) clear_direct(file_.get());
}

void InputFile::read(std::vector<iovec> parts, int64_t nbytes, int64_t offset) {
  size_t first = 0;
  bool may_be_unaligned = opened_direct_;
  for (int64_t done = 0; done < nbytes;) {
    const auto count = static_cast<int>(std::min<size_t>(parts.size() - first, IOV_MAX));
    const ssize_t got = ::preadv(file_.get(), parts.data() + first, count, offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && refuses_direct(errno) && may_be_unaligned) {
      // Even if another thread has already switched: this particular read was a direct one.
      clear_direct(file_.get());
      direct_ = may_be_unaligned = false;
      continue;
    }
    if (got < 0) throw_read_error(nbytes, offset, path_, errno);
    if (got == 0) throw_file_ends(nbytes, offset, path_, offset + done);
    // A short direct read may end anywhere; the next one must start aligned.
    const int64_t step = direct_ && got >= kDirectAlignment ? align_down(got) : got;
    drop_front(&parts, &first, static_cast<size_t>(step));
    done += step;
  }
}

int64_t regular_file_size(const std::string& path) {
  struct stat status;
  if (::stat(path.c_str(), &status) != 0) throw_file_error("open", path, errno);
  if (!S_ISREG(status.st_mode)) throw_not_regular("open", path, status.st_mode);
  return status.st_size;
}

}  // namespace ckpt_fast
