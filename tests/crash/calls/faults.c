// SPDX-License-Identifier: Apache-2.0
// Makes calls fail, when preloaded, with which programs change what is below the directory $CRASH_ROOT:
// Python's and the engine's. The calls of all threads and processes are counted together, in the file
// $CRASH_FAULTS, which tests write as well: see struct faults.
//
// Nothing is actually synced: that would only cost time.
#include "../watching.h"

#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>

struct faults {
  atomic_long count;  // calls so far
  long at;            // number of the call that fails, from 0; negative: none
  int error;          // the errno that it fails with
  int ends;       // whether nothing happens from that call on, as if all processes had been killed before it
  char call[64];  // the call that was the first to fail
  char path[PATH_MAX];
};

static struct faults* faults(void) {
  static _Atomic(struct faults*) mapped;
  struct faults* found = mapped;
  if (found == NULL) {
    const char* const name = getenv("CRASH_FAULTS");
    const int fd = (int)syscall(SYS_openat, AT_FDCWD, name, O_RDWR | O_CLOEXEC);
    if (fd < 0) die(name);
    found = mmap(NULL, sizeof *found, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (found == MAP_FAILED) die("mmap");
    syscall(SYS_close, fd);
    mapped = found;
  }
  return found;
}

// Counts a call; returns whether it must fail, with errno set.
static int fails(const char* call, const char* path) {
  struct faults* const all = faults();
  const long number = atomic_fetch_add(&all->count, 1);
  if (all->at < 0 || number < all->at || (number > all->at && !all->ends)) return 0;
  if (number == all->at) {
    snprintf(all->call, sizeof all->call, "%s", call);
    snprintf(all->path, sizeof all->path, "%s", path);
  }
  errno = all->error;
  return 1;
}

static int fails_at(const char* call, int at, const char* name) {
  char path[PATH_MAX];
  return is_watched(at, name, path) && fails(call, path);
}

static int fails_on(const char* call, int fd) {
  char path[PATH_MAX];
  return is_watched_file(fd, path) && fails(call, path);
}

static int open_at(int at, const char* name, int flags, mode_t mode) {
  const int changes = (flags & (O_CREAT | O_TRUNC)) || (flags & O_ACCMODE) != O_RDONLY;
  if ((changes || (flags & O_DIRECTORY)) && fails_at(changes ? "open" : "open a directory", at, name))
    return -1;
  return (int)syscall(SYS_openat, at, name, flags, mode);
}

DEFINE_OPENS

// A file that could not be closed properly is closed all the same.
int close(int fd) {
  char path[PATH_MAX];
  const int is_written = is_watched_file(fd, path) && (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY;
  const int must_fail = is_written && fails("close", path);
  const int error = errno;
  const int result = (int)syscall(SYS_close, fd);
  if (must_fail) errno = error;
  return must_fail ? -1 : result;
}

int fsync(int fd) {
  char path[PATH_MAX];
  if (!is_watched_file(fd, path)) return (int)syscall(SYS_fsync, fd);
  return fails("fsync", path) ? -1 : 0;
}

int fdatasync(int fd) { return fsync(fd); }

#define ON_FILE(type, name, number, arguments, ...) \
  type name arguments { return fails_on(#name, fd) ? -1 : (type)syscall(number, __VA_ARGS__); }

ON_FILE(ssize_t, write, SYS_write, (int fd, const void* bytes, size_t count), fd, bytes, count)
ON_FILE(ssize_t, writev, SYS_writev, (int fd, const struct iovec* parts, int count), fd, parts, count)
ON_FILE(ssize_t, pwrite, SYS_pwrite64, (int fd, const void* bytes, size_t count, off_t at), fd, bytes, count,
        at)
ON_FILE(ssize_t, pwrite64, SYS_pwrite64, (int fd, const void* bytes, size_t count, off64_t at), fd, bytes,
        count, at)
ON_FILE(ssize_t, pwritev, SYS_pwritev, (int fd, const struct iovec* parts, int count, off_t at), fd, parts,
        count, at, 0)
ON_FILE(ssize_t, pwritev64, SYS_pwritev, (int fd, const struct iovec* parts, int count, off64_t at), fd,
        parts, count, at, 0)
ON_FILE(int, fallocate, SYS_fallocate, (int fd, int mode, off_t at, off_t nbytes), fd, mode, at, nbytes)
ON_FILE(int, fallocate64, SYS_fallocate, (int fd, int mode, off64_t at, off64_t nbytes), fd, mode, at, nbytes)
ON_FILE(int, ftruncate, SYS_ftruncate, (int fd, off_t nbytes), fd, nbytes)
ON_FILE(int, ftruncate64, SYS_ftruncate, (int fd, off64_t nbytes), fd, nbytes)
ON_FILE(int, fchmod, SYS_fchmod, (int fd, mode_t mode), fd, mode)

#define ON_NAME(name, number, arguments, ...) \
  int name arguments { return fails_at(#name, at, path) ? -1 : (int)syscall(number, __VA_ARGS__); }

ON_NAME(mkdirat, SYS_mkdirat, (int at, const char* path, mode_t mode), at, path, mode)
ON_NAME(unlinkat, SYS_unlinkat, (int at, const char* path, int flags), at, path, flags)
ON_NAME(fchmodat, SYS_fchmodat, (int at, const char* path, mode_t mode, int flags), at, path, mode, flags)
ON_NAME(renameat2, SYS_renameat2, (int at, const char* path, int to_at, const char* to, unsigned flags), at,
        path, to_at, to, flags)
ON_NAME(linkat, SYS_linkat, (int at, const char* path, int to_at, const char* to, int flags), at, path, to_at,
        to, flags)

int mkdir(const char* path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int unlink(const char* path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char* path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int chmod(const char* path, mode_t mode) { return fchmodat(AT_FDCWD, path, mode, 0); }
int link(const char* from, const char* to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int at, const char* from, int to_at, const char* to) {
  return renameat2(at, from, to_at, to, 0);
}
int rename(const char* from, const char* to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }
