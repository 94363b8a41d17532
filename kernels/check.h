// OCTET_CHECK: a broken invariant of Octet itself ends the process with a sentence. Never for bad input of a user:
// that is refused with an absl::Status long before it gets here.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

namespace octet {

// Told the sentence before the process aborts; null: nobody. Set while there is one thread.
inline void (*check_listener)(const char* sentence) = nullptr;

[[noreturn]] inline void check_failed(const char* file, int line, const char* condition, const std::string& message) {
  const std::string sentence = std::string("internal error at ") + file + ":" + std::to_string(line) + ": " +
                               condition + " is false: " + message;
  std::fprintf(stderr, "octet: %s\n", sentence.c_str());
  if (check_listener != nullptr) check_listener(sentence.c_str());
  std::abort();
}

}  // namespace octet

#define OCTET_CHECK(condition, message)                                                 \
  do {                                                                                  \
    if (!(condition)) ::octet::check_failed(__FILE__, __LINE__, #condition, (message)); \
  } while (false)
