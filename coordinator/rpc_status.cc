#include "coordinator/rpc_status.h"

#include <algorithm>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "coordinator/text/utf8.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace octet {
namespace {

constexpr char kBadRequestUrl[] = "type.googleapis.com/google.rpc.BadRequest";
constexpr char kErrorInfoUrl[] = "type.googleapis.com/google.rpc.ErrorInfo";
constexpr char kRetryInfoUrl[] = "type.googleapis.com/google.rpc.RetryInfo";
// A status travels as metadata, of which clients take 8 KiB by default.
constexpr size_t kMaxViolations = 8;
constexpr size_t kMaxMessageBytes = 2000;

}  // namespace

absl::Status bad_request(const std::vector<FieldViolation>& violations) {
  google::rpc::BadRequest details;
  std::string message;
  const size_t shown = std::min(violations.size(), kMaxViolations);
  for (size_t i = 0; i < shown; ++i) {
    absl::StrAppend(&message, i == 0 ? "" : "; ", violations[i].field, " ", violations[i].description);
    google::rpc::BadRequest::FieldViolation* to = details.add_field_violations();
    to->set_field(violations[i].field);
    to->set_description(violations[i].description);
  }
  if (shown < violations.size()) absl::StrAppend(&message, "; and ", violations.size() - shown, " more");
  absl::Status status = absl::InvalidArgumentError(message);
  status.SetPayload(kBadRequestUrl, absl::Cord(details.SerializeAsString()));
  return status;
}

std::vector<FieldViolation> violations_of(const absl::Status& status) {
  std::vector<FieldViolation> violations;
  google::rpc::BadRequest details;
  const absl::optional<absl::Cord> payload = status.GetPayload(kBadRequestUrl);
  if (!payload.has_value() || !details.ParseFromString(std::string(*payload))) return violations;
  for (const auto& violation : details.field_violations()) {
    violations.push_back({violation.field(), violation.description()});
  }
  return violations;
}

absl::Status with_reason(absl::Status status, absl::string_view reason) {
  google::rpc::ErrorInfo info;
  info.set_reason(std::string(reason));
  info.set_domain("octet");
  status.SetPayload(kErrorInfoUrl, absl::Cord(info.SerializeAsString()));
  return status;
}

absl::Status with_retry_hint(absl::Status status, absl::Duration delay) {
  google::rpc::RetryInfo details;
  const absl::Duration whole = absl::Floor(delay, absl::Seconds(1));
  details.mutable_retry_delay()->set_seconds(absl::ToInt64Seconds(whole));
  details.mutable_retry_delay()->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(delay - whole)));
  status.SetPayload(kRetryInfoUrl, absl::Cord(details.SerializeAsString()));
  return status;
}

absl::Status model_is_loading() {
  return with_reason(with_retry_hint(absl::UnavailableError("the model is loading: try again later"), absl::Seconds(1)),
                     "MODEL_LOADING");
}

grpc::Status to_rpc_status(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const auto code = static_cast<grpc::StatusCode>(status.code());
  // Cut, if it must be, between characters.
  const std::string message = to_valid_utf8(std::string(status.message().substr(0, kMaxMessageBytes)));
  if (!status.GetPayload(kErrorInfoUrl).has_value()) {
    return to_rpc_status(with_reason(status, absl::StatusCodeToString(status.code())));
  }
  google::rpc::Status details;
  status.ForEachPayload([&](absl::string_view url, const absl::Cord& payload) {
    google::protobuf::Any* any = details.add_details();
    any->set_type_url(std::string(url));
    any->set_value(std::string(payload));
  });
  details.set_code(code);
  details.set_message(message);
  return {code, message, details.SerializeAsString()};
}

}  // namespace octet
