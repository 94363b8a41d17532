#include "coordinator/generate_call.h"

#include <algorithm>
#include <array>
#include <random>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "coordinator/generate_request.h"
#include "coordinator/rpc_status.h"

namespace octet {
namespace {

constexpr size_t kMaxRequestIdBytes = 128;

std::string random_request_id() {
  std::random_device source;
  std::string bytes;
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = source();
    bytes.append(reinterpret_cast<const char*>(&word), sizeof word);
  }
  return absl::BytesToHexString(bytes);
}

// The trace id of a W3C traceparent, 00-TRACEID-PARENTID-FLAGS, or nothing when it is not one.
std::string trace_id_of(absl::string_view traceparent) {
  constexpr std::array<size_t, 4> kLengths = {2, 32, 16, 2};
  size_t begin = 0;
  absl::string_view trace_id;
  for (size_t part = 0; part < kLengths.size(); ++part) {
    const absl::string_view text = traceparent.substr(std::min(begin, traceparent.size()), kLengths[part]);
    const auto is_hex = [](char c) { return absl::ascii_isdigit(c) || (c >= 'a' && c <= 'f'); };
    if (text.size() != kLengths[part] || !std::all_of(text.begin(), text.end(), is_hex)) return "";
    if (part == 1) trace_id = text;
    begin += kLengths[part] + 1;
    const bool last = part + 1 == kLengths.size();
    if (last ? begin - 1 != traceparent.size() : begin - 1 >= traceparent.size() || traceparent[begin - 1] != '-') {
      return "";
    }
  }
  // Values that the standard calls invalid.
  const auto all = [](absl::string_view text, char c) { return text.find_first_not_of(c) == absl::string_view::npos; };
  if (traceparent.substr(0, 2) == "ff" || all(trace_id, '0') || all(traceparent.substr(36, 16), '0')) return "";
  return std::string(trace_id);
}

std::string metadata_of(const grpc::CallbackServerContext& context, const char* key) {
  const auto found = context.client_metadata().find(key);
  if (found == context.client_metadata().end()) return "";
  return {found->second.data(), found->second.size()};
}

}  // namespace

// ---- CallRoom

CallRoom::CallRoom(const StreamLimits& limits, CallListener listener)
    : limits(limits), listener_(std::move(listener)), serving_{.refusal = model_is_loading()} {
  watcher_ = std::thread([this] { watch(); });
}

CallRoom::~CallRoom() {
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return calls_.empty(); });
    closing_ = true;
  }
  changed_.notify_all();
  watcher_.join();
}

CallRoom::Serving CallRoom::serving() const {
  const std::lock_guard lock(mutex_);
  return serving_;
}

void CallRoom::serve(Serving serving) {
  const std::lock_guard lock(mutex_);
  serving_ = std::move(serving);
}

void CallRoom::enter(std::shared_ptr<EngineCall> call) {
  const std::lock_guard lock(mutex_);
  if (calls_.empty()) changed_.notify_all();
  calls_.insert(std::move(call));
}

void CallRoom::leave(const std::shared_ptr<EngineCall>& call, const CallReport& report) {
  if (listener_) listener_(report);
  const std::lock_guard lock(mutex_);
  if (report.status.ok()) recent_call_seconds_ += 0.1 * (report.total_seconds - recent_call_seconds_);
  calls_.erase(call);
  if (calls_.empty()) changed_.notify_all();
}

std::vector<std::shared_ptr<EngineCall>> CallRoom::calls() const {
  const std::lock_guard lock(mutex_);
  return {calls_.begin(), calls_.end()};
}

absl::Duration CallRoom::retry_hint(const EngineStats& stats) const {
  const std::lock_guard lock(mutex_);
  // Those that run end within a recent call's time, and as many of the waiting take their places.
  const double turns = static_cast<double>(stats.waiting) / std::max(1, stats.running);
  return absl::Seconds(std::clamp(recent_call_seconds_ * std::max(0.5, turns), 0.1, 60.0));
}

// Nothing happens any more in a call whose client has stopped reading, so somebody has to look.
void CallRoom::watch() {
  const absl::Duration pause = std::clamp(limits.stall / 4, absl::Milliseconds(10), absl::Seconds(1));
  std::unique_lock lock(mutex_);
  while (!closing_) {
    if (calls_.empty()) {
      changed_.wait(lock);
      continue;
    }
    changed_.wait_for(lock, absl::ToChronoMilliseconds(pause));
    lock.unlock();
    for (const std::shared_ptr<EngineCall>& call : calls()) call->end_if_stalled();
    lock.lock();
  }
}

// ---- EngineCall

EngineCall::EngineCall(CallRoom* room, grpc::CallbackServerContext* context, const char* method)
    : room_(room), context_(context), began_(absl::Now()) {
  report_.method = absl::StrCat("octet.v1.InferenceService/", method);
}

void EngineCall::start() {
  identify();
  room_->admission.add([self = shared_from_this()] { self->admit(); });
}

// So that both sides' logs can be joined. Metadata is printable ASCII; an id that is not is replaced.
void EngineCall::identify() {
  std::string id = request().request_id();
  if (id.empty()) id = metadata_of(*context_, "x-request-id");
  const bool printable = std::all_of(id.begin(), id.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
  report_.request_id = id.empty() || id.size() > kMaxRequestIdBytes || !printable ? random_request_id() : id;
  context_->AddInitialMetadata("x-request-id", report_.request_id);
  const std::string traceparent = metadata_of(*context_, "traceparent");
  report_.trace_id = trace_id_of(traceparent);
  if (!report_.trace_id.empty()) context_->AddInitialMetadata("traceparent", traceparent);
}

absl::StatusOr<int32_t> EngineCall::priority_from_metadata() const {
  const std::string text = metadata_of(*context_, "octet-priority");
  int32_t priority = kDefaultPriority;
  if (text.empty() || (absl::SimpleAtoi(text, &priority) && priority >= 0 && priority <= kLowestPriority)) {
    return priority;
  }
  return bad_request({{"metadata octet-priority", absl::StrCat("must be 0, the most urgent, to ", kLowestPriority,
                                                               ", found ", absl::CEscape(text.substr(0, 32)))}});
}

int64_t EngineCall::deadline_ms() const {
  const auto deadline = context_->deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return kNoDeadline;
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::system_clock::now());
  return Engine::now_ms() + std::max<int64_t>(0, left.count());
}

// Admission thread. What is slow happens without the lock, so that a cancel does not wait; it only defers its finish().
void EngineCall::admit() {
  const CallRoom::Serving serving = room_->serving();
  absl::StatusOr<AcceptedRequest> accepted = pass_the_door(serving);

  const std::lock_guard lock(mutex_);
  admitting_ = false;
  if (deferred_finish_.has_value()) return finish(*deferred_finish_);
  if (!accepted.ok()) return finish(accepted.status());
  model_ = serving.model;
  outputs_.emplace(*accepted, model_->tokenizer);
  absl::StatusOr<RequestId> id = serving.engine->submit(std::move(accepted->request), shared_from_this());
  if (absl::IsResourceExhausted(id.status())) {
    return finish(with_reason(with_retry_hint(id.status(), room_->retry_hint(serving.engine->stats())), "QUEUE_FULL"));
  }
  if (!id.ok()) return finish(id.status());
  engine_ = serving.engine;
  engine_id_ = *id;
}

absl::StatusOr<AcceptedRequest> EngineCall::pass_the_door(const CallRoom::Serving& serving) const {
  if (!serving.refusal.ok()) return serving.refusal;
  const absl::StatusOr<int32_t> priority = priority_from_metadata();
  if (!priority.ok()) return priority.status();
  absl::StatusOr<AcceptedRequest> accepted = accept_request(request(), *serving.model);
  if (!accepted.ok()) return accepted.status();
  accepted->request.deadline_ms = deadline_ms();
  if (!request().has_priority()) accepted->request.priority = *priority;
  return accepted;
}

void EngineCall::on_event(const TokenEvent& event) {
  const std::lock_guard lock(inbox_mutex_);
  if (closed_) return;
  inbox_.push_back(event);
  if (std::exchange(delivery_due_, true)) return;
  room_->delivery.add([self = shared_from_this()] { self->deliver(); });
}

// Delivery thread.
void EngineCall::deliver() {
  const std::lock_guard lock(mutex_);
  {
    const std::lock_guard inbox_lock(inbox_mutex_);
    std::swap(inbox_, taken_);
    delivery_due_ = false;
  }
  for (const TokenEvent& event : taken_) {
    if (finished_) break;
    if (event.token.has_value() && report_.first_token_seconds == 0) {
      report_.first_token_seconds = absl::ToDoubleSeconds(absl::Now() - began_);
    }
    // At a stop string: the engine knows nothing of text.
    if (outputs_->absorb(event) && engine_ != nullptr) engine_->stop(engine_id_, event.output_index);
  }
  taken_.clear();
  if (done_) return;
  if (stalled()) return drop_client();
  if (finished_) return;
  if (outputs_->ended()) engine_ = nullptr;  // it has let go of the request, or will without being asked
  progress();
}

void EngineCall::end(const absl::Status& status) {
  const std::lock_guard lock(mutex_);
  finish(status);
}

void EngineCall::end_if_stalled() {
  const std::lock_guard lock(mutex_);
  if (!done_ && stalled()) drop_client();
}

// REQUIRES: mutex_. A client that does not read is reached by a reset only; cancelled_by_client() does the rest.
void EngineCall::drop_client() {
  cancel_request();
  context_->TryCancel();
}

void EngineCall::cancelled_by_client() {
  const std::lock_guard lock(mutex_);
  finish(absl::CancelledError("the client has cancelled the call, or is gone"));
}

// REQUIRES: mutex_.
void EngineCall::cancel_request() {
  if (engine_ != nullptr) engine_->cancel(engine_id_);
  engine_ = nullptr;
}

bool EngineCall::note_finished(const absl::Status& status) {
  if (std::exchange(finished_, true)) return false;
  report_.status = status;
  return true;
}

void EngineCall::finish(const absl::Status& status) {
  if (finished_) return;
  cancel_request();
  if (admitting_) {
    deferred_finish_ = status;  // gRPC frees the request after Finish(), and admit() is reading it
    return;
  }
  note_finished(status);
  finish_reactor(to_rpc_status(status));
}

void EngineCall::done() {
  const std::shared_ptr<EngineCall> self = shared_from_this();
  {
    const std::lock_guard lock(inbox_mutex_);
    closed_ = true;  // the engine may hold this a little longer, the room need not be there then
    inbox_.clear();
  }
  CallReport report;
  {
    const std::lock_guard lock(mutex_);
    done_ = true;
    report = report_;
    if (outputs_.has_value()) {
      report.prompt_tokens = outputs_->prompt_tokens();
      report.cached_tokens = outputs_->cached_tokens();
      report.completion_tokens = outputs_->completion_tokens();
    }
    report.total_seconds = absl::ToDoubleSeconds(absl::Now() - began_);
  }
  room_->leave(self, report);
}

// ---- GenerateCall

// One write at a time; what comes meanwhile waits in outputs().
void GenerateCall::progress() {
  if (writing_ || finished()) return;
  if (!outputs().status().ok()) return finish(outputs().status());
  if (!outputs().take(&sending_)) return;
  writing_ = true;
  write_began_ = absl::Now();
  if (sending_.has_usage()) {
    note_finished(absl::OkStatus());
    StartWriteAndFinish(&sending_, grpc::WriteOptions(), grpc::Status::OK);
  } else {
    StartWrite(&sending_);
  }
}

void GenerateCall::OnWriteDone(bool ok) {
  const std::lock_guard lock(mutex_);
  writing_ = false;
  if (ok && !finished()) progress();
}

bool GenerateCall::stalled() const {
  return writing_ &&
         (outputs().unread_tokens() > room_->limits.unread_tokens || absl::Now() - write_began_ > room_->limits.stall);
}

// ---- ChatCall

ChatCall::ChatCall(CallRoom* room, grpc::CallbackServerContext* context, const v1::ChatRequest& request,
                   v1::ChatResponse* response)
    : EngineCall(room, context, "Chat"), request_(as_generate_request(request)), response_(response) {}

void ChatCall::progress() {
  if (!outputs().status().ok()) return finish(outputs().status());
  while (outputs().take(&message_)) {
    while (response_->outputs_size() <= static_cast<int>(message_.output_index())) {
      response_->add_outputs()->mutable_message()->set_role("assistant");
    }
    v1::ChatOutput* output = response_->mutable_outputs(static_cast<int>(message_.output_index()));
    output->mutable_message()->mutable_content()->append(message_.text());
    output->mutable_tokens()->MergeFrom(message_.tokens());
    output->set_finish_reason(message_.finish_reason());
    if (message_.has_stop_token_id()) output->set_stop_token_id(message_.stop_token_id());
    if (message_.has_stop_string()) output->set_stop_string(message_.stop_string());
    if (message_.has_usage()) *response_->mutable_usage() = message_.usage();
  }
  if (!outputs().ended()) return;
  if (request_.chat().tools_json_size() > 0) {
    for (v1::ChatOutput& output : *response_->mutable_outputs()) find_tool_calls(&output);
  }
  finish(absl::OkStatus());
}

// An answer is its text or its calls.
void ChatCall::find_tool_calls(v1::ChatOutput* output) const {
  v1::ChatMessage* message = output->mutable_message();
  const std::optional<int32_t> first_token =
      output->tokens().empty() ? std::nullopt : std::optional<int32_t>(output->tokens(0).token_id());
  for (ChatToolCall& call : model().chat->parse_reply(message->content(), first_token)) {
    v1::ToolCall* to = message->add_tool_calls();
    to->set_name(std::move(call.name));
    to->set_arguments_json(std::move(call.arguments));
  }
  if (message->tool_calls_size() > 0) message->clear_content();
}

}  // namespace octet
