// SHA-256 of what is too long to be held at once.
#pragma once

#include <sodium.h>

#include <array>
#include <string>
#include <string_view>

#include "absl/strings/escaping.h"

namespace octet {

class Sha256 {
 public:
  Sha256() { crypto_hash_sha256_init(&state_); }
  void add(std::string_view bytes) {
    crypto_hash_sha256_update(&state_, reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
  }
  // In hexadecimal. Once, after the last add().
  std::string hex() {
    std::array<unsigned char, crypto_hash_sha256_BYTES> hash{};
    crypto_hash_sha256_final(&state_, hash.data());
    return absl::BytesToHexString({reinterpret_cast<const char*>(hash.data()), hash.size()});
  }

 private:
  crypto_hash_sha256_state state_;
};

}  // namespace octet
