// SPDX-License-Identifier: Apache-2.0
#include "engine/base/error.h"

#include <sys/stat.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace ckpt_fast {

namespace {

std::string reason(int error_number) { return std::system_category().message(error_number); }

std::string transfer(const char* verb, int64_t nbytes, int64_t offset, const char* preposition,
                     const std::string& path) {
  return std::string(verb) + " " + std::to_string(nbytes) + " bytes at " + std::to_string(offset) + " " +
         preposition + " " + path + ": ";
}

}  // namespace

SystemError::SystemError(const std::string& text, int error_number, std::string path)
    : std::runtime_error(text), error_number_(error_number), path_(std::move(path)) {}

void throw_file_error(const char* verb, const std::string& path, int error_number) {
  throw SystemError(std::string(verb) + " " + path + ": " + reason(error_number), error_number, path);
}

void throw_not_regular(const char* verb, const std::string& path, uint32_t mode) {
  if (S_ISDIR(mode)) throw_file_error(verb, path, EISDIR);
  const char* const kind = S_ISFIFO(mode) ? "FIFO" : S_ISSOCK(mode) ? "socket" : "device";
  const std::string text = std::string(verb) + " " + path + ": it is a " + kind + ", not a regular file";
  throw SystemError(text, EIO, path);
}

void throw_write_error(int64_t nbytes, int64_t offset, const std::string& path, int error_number) {
  throw SystemError(transfer("write", nbytes, offset, "to", path) + reason(error_number), error_number, path);
}

void throw_read_error(int64_t nbytes, int64_t offset, const std::string& path, int error_number) {
  throw SystemError(transfer("read", nbytes, offset, "from", path) + reason(error_number), error_number,
                    path);
}

void throw_file_ends(int64_t nbytes, int64_t offset, const std::string& path, int64_t size) {
  throw SystemError(transfer("read", nbytes, offset, "from", path) + "file ends at " + std::to_string(size),
                    EIO, path);
}

}  // namespace ckpt_fast
