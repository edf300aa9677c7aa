// SPDX-License-Identifier: Apache-2.0
// What libraries share that are preloaded to watch calls: whether a call concerns what lies below the
// directory $CRASH_ROOT, and the forms of open(2).
#ifndef CKPT_FAST_TESTS_WATCHING_H
#define CKPT_FAST_TESTS_WATCHING_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static void die(const char* what) {
  perror(what);
  abort();
}

static int is_below_root(const char* path) {
  const char* const root = getenv("CRASH_ROOT");
  const size_t length = strlen(root);
  return strncmp(path, root, length) == 0 && (path[length] == '/' || path[length] == 0);
}

// Finds the path of a descriptor; returns whether to watch it.
static int is_watched_file(int fd, char* path) {
  char link[64];
  path[0] = 0;
  if (getenv("CRASH_ROOT") == NULL) return 0;
  const int error = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, PATH_MAX - 1);
  path[length < 0 ? 0 : length] = 0;
  errno = error;
  return is_below_root(path);
}

// Makes a path absolute; returns whether to watch it.
static int is_watched(int at, const char* name, char* path) {
  if (getenv("CRASH_ROOT") == NULL) return 0;
  if (name[0] == '/') {
    snprintf(path, PATH_MAX, "%s", name);
  } else {
    if (at != AT_FDCWD)
      is_watched_file(at, path);
    else if (getcwd(path, PATH_MAX) == NULL)
      die("getcwd");
    const size_t length = strlen(path);
    snprintf(path + length, PATH_MAX - length, "/%s", name);
  }
  return is_below_root(path);
}

static mode_t mode_in(int flags, va_list arguments) {
  return flags & (O_CREAT | __O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
}

#define OPEN(name, at, ...)                        \
  int name(__VA_ARGS__, int flags, ...) {          \
    va_list arguments;                             \
    va_start(arguments, flags);                    \
    const mode_t mode = mode_in(flags, arguments); \
    va_end(arguments);                             \
    return open_at(at, path, flags, mode);         \
  }

// All of them lead to the library's own open_at.
#define DEFINE_OPENS                         \
  OPEN(open, AT_FDCWD, const char* path)     \
  OPEN(open64, AT_FDCWD, const char* path)   \
  OPEN(openat, at, int at, const char* path) \
  OPEN(openat64, at, int at, const char* path)

#endif  // CKPT_FAST_TESTS_WATCHING_H
