// SPDX-License-Identifier: Apache-2.0
// Records, when preloaded, what programs do to names and contents below the directory $CRASH_ROOT.
//
// Each line of the file $CRASH_LOG is one call that changed a directory, gave a file its content (at close)
// or made something durable, in order, across all threads and processes:
//
//   call \t inode \t path \t second path \t file with a copy of the content
//
// Nothing is actually synced: that would only cost time.
#include "../watching.h"

#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>

static __thread int log_file;

// One call at a time across all threads and processes: each reopens the log, so that flock serializes them.
static void lock(void) {
  const char* const name = getenv("CRASH_LOG");
  log_file = (int)syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (log_file < 0 || flock(log_file, LOCK_EX) != 0) die(name);
}

static void unlock(void) {
  const int error = errno;
  syscall(SYS_close, log_file);
  errno = error;
}

static void record(const char* call, ino_t inode, const char* path, const char* second, const char* copy) {
  char line[3 * PATH_MAX];
  const int length =
      snprintf(line, sizeof line, "%s\t%lu\t%s\t%s\t%s\n", call, (unsigned long)inode, path, second, copy);
  if (write(log_file, line, (size_t)length) != length) die("record");
}

// Records a call on a descriptor's file, with its content if it is a regular file.
static void record_file(const char* call, int fd, const char* path) {
  static int copies;
  char link[64], copy[PATH_MAX] = "";
  struct stat status;
  if (fstat(fd, &status) != 0) die("fstat");
  if (S_ISREG(status.st_mode)) {
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    snprintf(copy, sizeof copy, "%s.%d.%d", getenv("CRASH_LOG"), getpid(), copies++);
    const int from = (int)syscall(SYS_openat, AT_FDCWD, link, O_RDONLY);
    const int to = (int)syscall(SYS_openat, AT_FDCWD, copy, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (from < 0 || to < 0) die(copy);
    ssize_t sent;
    while ((sent = sendfile(to, from, NULL, 1 << 20)) > 0) continue;
    if (sent < 0) die(copy);
    syscall(SYS_close, from);
    syscall(SYS_close, to);
  }
  record(call, status.st_ino, path, "", copy);
}

static int open_at(int at, const char* name, int flags, mode_t mode) {
  char path[PATH_MAX];
  if (!(flags & (O_CREAT | O_TRUNC)) || !is_watched(at, name, path)) {
    return (int)syscall(SYS_openat, at, name, flags, mode);
  }
  lock();
  const int existed = faccessat(at, name, F_OK, 0) == 0;
  const int fd = (int)syscall(SYS_openat, at, name, flags, mode);
  if (fd >= 0) record_file(existed ? "content" : "create", fd, path);
  unlock();
  return fd;
}

DEFINE_OPENS

int close(int fd) {
  char path[PATH_MAX];
  if (!is_watched_file(fd, path) || (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY) {
    return (int)syscall(SYS_close, fd);
  }
  lock();
  record_file("content", fd, path);
  const int result = (int)syscall(SYS_close, fd);
  unlock();
  return result;
}

int fsync(int fd) {
  char path[PATH_MAX];
  if (!is_watched_file(fd, path)) return (int)syscall(SYS_fsync, fd);
  lock();
  record_file("sync", fd, path);
  unlock();
  return 0;
}

int fdatasync(int fd) { return fsync(fd); }

// Changes of names, recorded if they succeed.
static int change(const char* call, long result, const char* path, const char* second) {
  struct stat status = {.st_ino = 0};
  if (result == 0) {
    stat(path, &status);
    record(call, status.st_ino, path, second, "");
  }
  unlock();
  return (int)result;
}

int mkdirat(int at, const char* name, mode_t mode) {
  char path[PATH_MAX];
  if (!is_watched(at, name, path)) return (int)syscall(SYS_mkdirat, at, name, mode);
  lock();
  return change("mkdir", syscall(SYS_mkdirat, at, name, mode), path, "");
}

int mkdir(const char* path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int unlinkat(int at, const char* name, int flags) {
  char path[PATH_MAX];
  if (!is_watched(at, name, path)) return (int)syscall(SYS_unlinkat, at, name, flags);
  lock();
  return change("unlink", syscall(SYS_unlinkat, at, name, flags), path, "");
}

int unlink(const char* path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char* path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int linkat(int from_at, const char* from, int to_at, const char* to, int flags) {
  char path[PATH_MAX], second[PATH_MAX];
  if (!is_watched(from_at, from, path) | !is_watched(to_at, to, second)) {
    return (int)syscall(SYS_linkat, from_at, from, to_at, to, flags);
  }
  lock();
  return change("link", syscall(SYS_linkat, from_at, from, to_at, to, flags), path, second);
}

int link(const char* from, const char* to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int renameat2(int from_at, const char* from, int to_at, const char* to, unsigned flags) {
  char path[PATH_MAX], second[PATH_MAX];
  if (!is_watched(from_at, from, path) | !is_watched(to_at, to, second)) {
    return (int)syscall(SYS_renameat2, from_at, from, to_at, to, flags);
  }
  lock();
  const char* const call = flags & RENAME_EXCHANGE ? "exchange" : "rename";
  return change(call, syscall(SYS_renameat2, from_at, from, to_at, to, flags), path, second);
}

int renameat(int from_at, const char* from, int to_at, const char* to) {
  return renameat2(from_at, from, to_at, to, 0);
}

int rename(const char* from, const char* to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }
