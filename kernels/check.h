// OCTET_CHECK: a broken invariant of Octet itself ends the process with a sentence. Never for bad input of a user:
// that is refused with an absl::Status long before it gets here.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

namespace octet {

[[noreturn]] inline void check_failed(const char* file, int line, const char* condition, const std::string& message) {
  std::fprintf(stderr, "octet: internal error at %s:%d: %s is false: %s\n", file, line, condition, message.c_str());
  std::abort();
}

}  // namespace octet

#define OCTET_CHECK(condition, message)                                                    \
  do {                                                                                     \
    if (!(condition)) ::octet::check_failed(__FILE__, __LINE__, #condition, (message));    \
  } while (false)
