#include "coordinator/server_credentials.h"

#include <grpcpp/security/server_credentials.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "coordinator/token_auth.h"

namespace octet {
namespace {

absl::StatusOr<std::string> read_pem(const char* flag, const std::string& path, const char* kind) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  if (!file.is_open() || file.bad()) {
    return absl::FailedPreconditionError(absl::StrCat(flag, " ", path, " cannot be read: ", std::strerror(errno)));
  }
  if (!absl::StrContains(text.str(), absl::StrCat("-----BEGIN")) || !absl::StrContains(text.str(), kind)) {
    return absl::FailedPreconditionError(
        absl::StrCat(flag, " ", path, " holds no ", kind, " in PEM form (-----BEGIN ... ", kind, "-----)"));
  }
  return text.str();
}

// gRPC would only say that it cannot listen.
absl::Status check_pair(const AccessOptions& access, const std::string& certificate, const std::string& key) {
  const auto bio = [](const std::string& text) {
    return std::unique_ptr<BIO, decltype(&BIO_free)>(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())),
                                                     BIO_free);
  };
  const std::unique_ptr<X509, decltype(&X509_free)> x509(
      PEM_read_bio_X509(bio(certificate).get(), nullptr, nullptr, nullptr), X509_free);
  if (x509 == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat("--tls-cert ", access.tls_cert, " is damaged"));
  }
  // Without a callback OpenSSL would ask the terminal for a password.
  const auto no_password = [](char*, int, int, void*) { return 0; };
  const std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)> private_key(
      PEM_read_bio_PrivateKey(bio(key).get(), nullptr, no_password, nullptr), EVP_PKEY_free);
  if (private_key == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("--tls-key ", access.tls_key, " is damaged, or encrypted: give it without a password"));
  }
  if (X509_check_private_key(x509.get(), private_key.get()) == 1) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("--tls-key ", access.tls_key, " is not the key of --tls-cert ",
                                                    access.tls_cert, ": give the two that belong together"));
}

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> tls_credentials(const AccessOptions& access) {
  if (access.tls_cert.empty() || access.tls_key.empty()) {
    return absl::FailedPreconditionError("TLS needs both --tls-cert and --tls-key");
  }
  absl::StatusOr<std::string> certificate = read_pem("--tls-cert", access.tls_cert, "CERTIFICATE");
  if (!certificate.ok()) return certificate.status();
  absl::StatusOr<std::string> key = read_pem("--tls-key", access.tls_key, "PRIVATE KEY");
  if (!key.ok()) return key.status();
  if (absl::Status status = check_pair(access, *certificate, *key); !status.ok()) return status;
  grpc::SslServerCredentialsOptions options;
  options.pem_key_cert_pairs = {{.private_key = *key, .cert_chain = *certificate}};
  if (!access.tls_client_ca.empty()) {
    absl::StatusOr<std::string> authorities = read_pem("--tls-client-ca", access.tls_client_ca, "CERTIFICATE");
    if (!authorities.ok()) return authorities.status();
    options.pem_root_certs = *authorities;
    options.client_certificate_request = GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;
  }
  return grpc::SslServerCredentials(options);
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> make_server_credentials(const AccessOptions& access,
                                                                                 const ListenAddress& address) {
  const bool tls = !access.tls_cert.empty() || !access.tls_key.empty() || !access.tls_client_ca.empty();
  const bool clients_are_known = !access.token_file.empty() || !access.tls_client_ca.empty();
  if (!address.loopback && !clients_are_known && !access.insecure) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the address ", address.to_string(),
        " can be reached from other machines: give --token-file FILE, so that clients must show its token, "
        "--tls-client-ca FILE, so that they must have a certificate, or --insecure if anyone there may use this "
        "server"));
  }
  std::string token;
  if (!access.token_file.empty()) {
    absl::StatusOr<std::string> read = read_token_file(access.token_file);
    if (!read.ok()) return read.status();
    token = *std::move(read);
  }
  if (!tls) return token.empty() ? grpc::InsecureServerCredentials() : token_server_credentials(token);
  absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> credentials = tls_credentials(access);
  if (credentials.ok() && !token.empty()) (*credentials)->SetAuthMetadataProcessor(token_metadata_processor(token));
  return credentials;
}

}  // namespace octet
