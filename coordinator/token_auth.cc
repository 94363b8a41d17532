#include "coordinator/token_auth.h"

#include <fcntl.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpcpp/security/auth_metadata_processor.h>
#include <grpcpp/security/server_credentials.h>
#include <openssl/crypto.h>
#include <openssl/sha.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "kernels/check.h"

namespace octet {
namespace {

constexpr size_t kMaxTokenBytes = 4096;  // fits the metadata limit of the server

using Digest = std::array<unsigned char, SHA256_DIGEST_LENGTH>;

Digest digest_of(absl::string_view text) {
  Digest digest;
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest.data());
  return digest;
}

absl::string_view view_of(const grpc_slice& slice) {
  return {reinterpret_cast<const char*>(GRPC_SLICE_START_PTR(slice)), GRPC_SLICE_LENGTH(slice)};
}

constexpr char kRefusal[] =
    "this server wants the metadata \"authorization: Bearer TOKEN\" with the token of its --token-file";

// The one thing it knows is the digest: the token itself is not kept.
class TokenCheck {
 public:
  explicit TokenCheck(absl::string_view token) : digest_(digest_of(token)) {}

  bool accepts(const grpc_metadata* metadata, size_t count) const {
    const grpc_metadata* found = nullptr;
    for (size_t i = 0; i < count; ++i) {
      if (view_of(metadata[i].key) != "authorization") continue;
      if (found != nullptr) return false;  // two of them: which one counts would be a game
      found = &metadata[i];
    }
    return found != nullptr && accepts(view_of(found->value));
  }

  // The value of an authorization header.
  bool accepts(absl::string_view value) const {
    constexpr absl::string_view kScheme = "bearer ";
    if (!absl::StartsWithIgnoreCase(value, kScheme)) return false;
    const Digest given = digest_of(value.substr(kScheme.size()));
    return CRYPTO_memcmp(given.data(), digest_.data(), given.size()) == 0;
  }

  static void process(void* state, grpc_auth_context*, const grpc_metadata* metadata, size_t count,
                      grpc_process_auth_metadata_done_cb done, void* user_data) {
    if (static_cast<TokenCheck*>(state)->accepts(metadata, count)) {
      done(user_data, nullptr, 0, nullptr, 0, GRPC_STATUS_OK, nullptr);
    } else {
      done(user_data, nullptr, 0, nullptr, 0, GRPC_STATUS_UNAUTHENTICATED, kRefusal);
    }
  }

  static void destroy(void* state) { delete static_cast<TokenCheck*>(state); }

 private:
  Digest digest_;
};

class TokenMetadataProcessor final : public grpc::AuthMetadataProcessor {
 public:
  explicit TokenMetadataProcessor(absl::string_view token) : check_(token) {}
  bool IsBlocking() const override { return false; }
  grpc::Status Process(const InputMetadata& metadata, grpc::AuthContext*, OutputMetadata*, OutputMetadata*) override {
    const auto found = metadata.find("authorization");
    const bool good = metadata.count("authorization") == 1 &&
                      check_.accepts(absl::string_view(found->second.data(), found->second.size()));
    return good ? grpc::Status::OK : grpc::Status(grpc::StatusCode::UNAUTHENTICATED, kRefusal);
  }

 private:
  TokenCheck check_;
};

// gRPC's own C++ class for plain text credentials refuses a metadata processor; the C core beneath it does not.
class TokenServerCredentials final : public grpc::ServerCredentials {
 public:
  explicit TokenServerCredentials(absl::string_view token) : credentials_(grpc_insecure_server_credentials_create()) {
    grpc_server_credentials_set_auth_metadata_processor(
        credentials_, {.process = TokenCheck::process, .destroy = TokenCheck::destroy, .state = new TokenCheck(token)});
  }
  ~TokenServerCredentials() override { grpc_server_credentials_release(credentials_); }

  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {
    OCTET_CHECK(false, "the token check is the only metadata processor of these credentials");
  }

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), credentials_);
  }

  grpc_server_credentials* credentials_;
};

}  // namespace

absl::StatusOr<std::string> read_token_file(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    return absl::NotFoundError(absl::StrCat("token file ", path, " cannot be opened: ", std::strerror(errno)));
  }
  struct stat facts {};
  std::string text(kMaxTokenBytes + 1, '\0');
  const bool readable = fstat(fd, &facts) == 0 && S_ISREG(facts.st_mode);
  const ssize_t bytes = readable ? read(fd, text.data(), text.size()) : -1;
  close(fd);
  if (bytes < 0) return absl::FailedPreconditionError(absl::StrCat("token file ", path, " is not a readable file"));
  if ((facts.st_mode & 077) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("token file ", path, " may be read or written by others: chmod 600 ", path));
  }
  text.resize(static_cast<size_t>(bytes));
  absl::string_view token = text;
  while (absl::ConsumeSuffix(&token, "\n") || absl::ConsumeSuffix(&token, "\r")) {
  }
  if (token.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "token file ", path, " is empty: write one line of secret into it, as in: openssl rand -hex 32 > ", path));
  }
  if (token.size() > kMaxTokenBytes) {
    return absl::FailedPreconditionError(
        absl::StrCat("token file ", path, " holds more than ", kMaxTokenBytes, " bytes: a token is one line"));
  }
  if (!std::all_of(token.begin(), token.end(), [](char c) { return c > 0x20 && c < 0x7f; })) {
    return absl::FailedPreconditionError(
        absl::StrCat("token file ", path, " must hold one line of printable ASCII without spaces"));
  }
  return std::string(token);
}

std::shared_ptr<grpc::ServerCredentials> token_server_credentials(const std::string& token) {
  OCTET_CHECK(!token.empty(), "a server with an empty token would be open");
  return std::make_shared<TokenServerCredentials>(token);
}

std::shared_ptr<grpc::AuthMetadataProcessor> token_metadata_processor(const std::string& token) {
  OCTET_CHECK(!token.empty(), "a server with an empty token would be open");
  return std::make_shared<TokenMetadataProcessor>(token);
}

}  // namespace octet
