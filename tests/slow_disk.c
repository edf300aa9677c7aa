// SPDX-License-Identifier: Apache-2.0
// Simulates a slow or broken disk when preloaded. Every read and write of a data file first waits
// SLOW_DISK_MS milliseconds; with SLOW_DISK_ERRORS=n the first n writes fail with EIO.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int failed;

static long number(const char* name) {
  const char* const value = getenv(name);
  return value != NULL ? atol(value) : 0;
}

static int is_data_file(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return strstr(path, ".distcp") != NULL;
}

// Returns whether the call must fail.
static int meet(int fd, int writing) {
  if (!is_data_file(fd)) return 0;
  usleep((useconds_t)number("SLOW_DISK_MS") * 1000);
  if (!writing || atomic_fetch_add(&failed, 1) >= number("SLOW_DISK_ERRORS")) return 0;
  errno = EIO;
  return 1;
}

#define CALL(name, writing, arguments, ...)                             \
  ssize_t name arguments {                                              \
    static ssize_t(*original) arguments;                                \
    if (original == NULL) *(void**)&original = dlsym(RTLD_NEXT, #name); \
    return meet(fd, writing) ? -1 : original(__VA_ARGS__);              \
  }

CALL(write, 1, (int fd, const void* bytes, size_t count), fd, bytes, count)
CALL(read, 0, (int fd, void* bytes, size_t count), fd, bytes, count)
CALL(pwritev, 1, (int fd, const struct iovec* parts, int count, off_t at), fd, parts, count, at)
CALL(pwritev64, 1, (int fd, const struct iovec* parts, int count, off64_t at), fd, parts, count, at)
CALL(pwrite, 1, (int fd, const void* bytes, size_t count, off_t at), fd, bytes, count, at)
CALL(pwrite64, 1, (int fd, const void* bytes, size_t count, off64_t at), fd, bytes, count, at)
CALL(preadv, 0, (int fd, const struct iovec* parts, int count, off_t at), fd, parts, count, at)
CALL(preadv64, 0, (int fd, const struct iovec* parts, int count, off64_t at), fd, parts, count, at)
CALL(preadv2, 0, (int fd, const struct iovec* parts, int count, off_t at, int how), fd, parts, count, at, how)
CALL(preadv64v2, 0, (int fd, const struct iovec* parts, int count, off64_t at, int how), fd, parts, count, at,
     how)
