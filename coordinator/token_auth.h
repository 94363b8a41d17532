// Bearer tokens for a whole gRPC server. The check sits in the channel's filters, below method dispatch: no method,
// known or unknown, health and reflection included, is reached without the token. Invariant: secrets are compared as
// digests, in constant time, and are never part of a message.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace grpc {
class AuthMetadataProcessor;
class ServerCredentials;
}  // namespace grpc

namespace octet {

// Reads a token: the file's text without trailing newlines. FAILED_PRECONDITION when it is empty, not printable ASCII,
// or readable by others than its owner (with the chmod that helps); NOT_FOUND when it is not there.
absl::StatusOr<std::string> read_token_file(const std::string& path);

// Credentials for ServerBuilder::AddListeningPort: plain text transport, and every call needs the metadata
// "authorization: Bearer TOKEN" or ends with UNAUTHENTICATED. REQUIRES: token is not empty.
std::shared_ptr<grpc::ServerCredentials> token_server_credentials(const std::string& token);

// The same check for credentials that encrypt: grpc::ServerCredentials::SetAuthMetadataProcessor. REQUIRES: as above.
std::shared_ptr<grpc::AuthMetadataProcessor> token_metadata_processor(const std::string& token);

}  // namespace octet
