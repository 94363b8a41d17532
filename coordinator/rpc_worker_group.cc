#include "coordinator/rpc_worker_group.h"

#include <grpcpp/ext/health_check_service_server_builder_option.h>
#include <grpcpp/grpcpp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "coordinator/token_auth.h"
#include "kernels/check.h"
#include "octet/internal/v1/worker.grpc.pb.h"
#include "worker/step_wire.h"

namespace octet {
namespace {

namespace wire_v1 = internal::v1;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kStopTimeout{10};
constexpr size_t kMaxSocketPath = 100;  // sockaddr_un has room for 107 bytes

// A directory of this user's own for the socket. Removed as soon as every rank is in, so a killed job leaves nothing
// behind.
absl::StatusOr<std::string> make_private_directory() {
  const char* chosen = std::getenv("TMPDIR");
  std::string base = chosen != nullptr && *chosen == '/' ? chosen : "/tmp";
  if (base.size() > kMaxSocketPath - 32) base = "/tmp";
  std::string path = base + "/octet-XXXXXX";
  if (mkdtemp(path.data()) == nullptr) {  // mode 0700
    return absl::FailedPreconditionError(absl::StrCat("the directory ", path, " for the ranks' socket cannot be made: ",
                                                      std::strerror(errno), "; set TMPDIR to one that can be written"));
  }
  return path;
}

// The public server's library services (reflection, health) register themselves with every builder of the process;
// ranks get none of them.
class NoLibraryServices final : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override { plugins->clear(); }
};

// What one rank said about a step.
struct Answer {
  uint64_t digest = 0;
  std::string error;
  StepTiming timing;
};

// A submitted plan and what has come back for it.
struct Pending {
  uint64_t step = 0;
  bool stop = false;
  std::optional<StepResult> local;
  std::vector<std::optional<Answer>> remote;  // [ranks - 1], rank r at r - 1
  int32_t missing = 0;
};

}  // namespace

// One mutex guards the group and all its streams: a step takes it a handful of times.
struct RpcWorkerGroup::Impl final : public wire_v1::WorkerService::CallbackService {
  class RankStream;

  Impl(const RpcWorkerGroupOptions& options, WorkerFunction local)
      : options(options),
        streams(options.ranks - 1, nullptr),
        watchdog(options.watchdog, options.ranks, Clock::now()),
        local(std::move(local)) {}

  grpc::ServerBidiReactor<wire_v1::RankMessage, wire_v1::Plan>* Work(grpc::CallbackServerContext* context) override;

  absl::Status start_server();
  void remove_socket();
  void run_local();
  void watch();

  // REQUIRES, of the next ones: mutex.
  absl::Status admit(RankStream* stream, int32_t rank);
  void take_answer(int32_t rank, const wire_v1::Result& result);
  void take_place(int32_t rank, const wire_v1::Place& place);
  void answered(Pending* step);
  void fail(absl::Status status);
  void look_after_ranks();
  std::vector<int> unanswered() const;
  std::optional<Flight> flight_of(int32_t rank) const;
  std::string last_words_of(int32_t rank) const;
  std::string state_of(int32_t rank) const;
  // Without it: calls out.
  void announce_failure();
  absl::Status compare(const Pending& pending) const;

  const RpcWorkerGroupOptions options;
  std::string socket_directory, local_address, remote_address;

  bool settled() const { return !failure.ok() || pending.empty() || pending.back().missing == 0; }

  std::mutex mutex;
  std::condition_variable changed;   // notified with the mutex held, after any change that somebody may wait for
  std::condition_variable closed;    // `closing` became true: steps do not wake the watch
  std::vector<RankStream*> streams;  // rank r at r - 1; null: not here
  int32_t open_streams = 0;
  int32_t ranks_here = 0;
  std::deque<Pending> pending;
  std::deque<StepPlan> local_plans;
  bool stop_submitted = false;
  bool closing = false;
  absl::Status failure;
  bool failure_announced = false;

  Watchdog watchdog;

  WorkerFunction local;
  std::thread local_thread, watch_thread;
  std::unique_ptr<grpc::Server> server;  // last: streams use what is above
};

// Rank 0's end of one rank's stream. Lives until OnDone. Its state is guarded by the group's mutex.
class RpcWorkerGroup::Impl::RankStream final : public grpc::ServerBidiReactor<wire_v1::RankMessage, wire_v1::Plan> {
 public:
  explicit RankStream(Impl* group) : group_(group) { StartRead(&incoming_); }

  void send(std::shared_ptr<const wire_v1::Plan> plan) {
    outgoing_.push_back(std::move(plan));
    write_next();
  }

  void finish(const grpc::Status& status) {
    if (std::exchange(finished_, true)) return;
    Finish(status);
  }

  void OnReadDone(bool ok) override {
    {
      const std::lock_guard lock(group_->mutex);
      if (!ok) {
        lost();
      } else if (rank_ == 0) {
        greet();
      } else if (incoming_.has_result()) {
        group_->take_answer(rank_, incoming_.result());
      } else if (incoming_.has_place()) {
        group_->take_place(rank_, incoming_.place());
      }
      if (ok && !finished_) StartRead(&incoming_);
    }
    group_->announce_failure();
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(group_->mutex);
    writing_ = false;
    if (ok) write_next();  // otherwise the read side finds the stream broken and says so
  }

  void OnCancel() override {
    {
      const std::lock_guard lock(group_->mutex);
      lost();
    }
    group_->announce_failure();
  }

  void OnDone() override {
    {
      const std::lock_guard lock(group_->mutex);
      if (rank_ != 0) group_->streams[rank_ - 1] = nullptr;
      --group_->open_streams;
      group_->changed.notify_all();
    }
    delete this;
  }

 private:
  void greet() {
    const absl::Status status = incoming_.has_hello() ? group_->admit(this, incoming_.hello().rank())
                                                      : absl::InvalidArgumentError("the first message must be Hello");
    if (status.ok()) {
      rank_ = incoming_.hello().rank();
    } else {
      finish({static_cast<grpc::StatusCode>(status.code()), std::string(status.message())});
    }
  }

  void lost() {
    if (rank_ != 0 && !finished_ && !group_->closing) {
      group_->fail(absl::UnavailableError(
          absl::StrCat("rank ", rank_, " is lost: its plan stream broke; ", group_->last_words_of(rank_))));
    }
    finish(grpc::Status::CANCELLED);
  }

  void write_next() {
    if (writing_ || finished_ || outgoing_.empty()) return;
    sending_ = std::move(outgoing_.front());
    outgoing_.pop_front();
    writing_ = true;
    StartWrite(sending_.get());
  }

  Impl* const group_;
  int32_t rank_ = 0;  // 0: has not said Hello
  wire_v1::RankMessage incoming_;
  std::deque<std::shared_ptr<const wire_v1::Plan>> outgoing_;
  std::shared_ptr<const wire_v1::Plan> sending_;
  bool writing_ = false;
  bool finished_ = false;
};

grpc::ServerBidiReactor<wire_v1::RankMessage, wire_v1::Plan>* RpcWorkerGroup::Impl::Work(grpc::CallbackServerContext*) {
  const std::lock_guard lock(mutex);
  ++open_streams;
  return new RankStream(this);
}

absl::Status RpcWorkerGroup::Impl::start_server() {
  absl::StatusOr<std::string> directory = make_private_directory();
  if (!directory.ok()) return directory.status();
  socket_directory = *directory;
  local_address = absl::StrCat("unix:", socket_directory, "/plans.sock");

  std::shared_ptr<grpc::ServerCredentials> credentials = token_server_credentials(options.job_secret);
  grpc::ServerBuilder builder;
  builder.SetOption(std::make_unique<NoLibraryServices>());
  builder.SetOption(std::make_unique<grpc::HealthCheckServiceServerBuilderOption>(nullptr));
  builder.RegisterService(this);
  builder.AddListeningPort(local_address, credentials);
  int tcp_port = 0;
  if (options.remote_ranks) builder.AddListeningPort("[::]:0", credentials, &tcp_port);
  builder.SetMaxReceiveMessageSize(64 << 10);  // ranks answer with a digest
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // As on the ranks' side: pings find a peer that hangs without closing its socket.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5'000);
  server = builder.BuildAndStart();
  if (server == nullptr) {
    return absl::UnavailableError(absl::StrCat("rank 0 cannot listen for the other ranks at ", local_address,
                                               options.remote_ranks ? " and on a TCP port of its choice" : ""));
  }
  if (chmod((socket_directory + "/plans.sock").c_str(), 0600) != 0) {
    return absl::InternalError(absl::StrCat(local_address, ": ", std::strerror(errno)));
  }
  if (options.remote_ranks) remote_address = absl::StrCat(options.host, ":", tcp_port);
  return absl::OkStatus();
}

void RpcWorkerGroup::Impl::remove_socket() {
  if (socket_directory.empty()) return;
  unlink((socket_directory + "/plans.sock").c_str());
  rmdir(socket_directory.c_str());
  socket_directory.clear();
}

void RpcWorkerGroup::Impl::run_local() {
  while (true) {
    StepPlan plan;
    {
      std::unique_lock lock(mutex);
      changed.wait(lock, [this] { return closing || !local_plans.empty(); });
      if (closing) return;
      plan = std::move(local_plans.front());
      local_plans.pop_front();
    }
    StepResult result = local(plan);
    const std::lock_guard lock(mutex);
    // Steps finish in order, so the oldest without a local result is this one.
    for (Pending& step : pending) {
      if (step.local.has_value()) continue;
      step.local = std::move(result);
      answered(&step);
      break;
    }
    if (plan.stop) return;
  }
}

absl::Status RpcWorkerGroup::Impl::admit(RankStream* stream, int32_t rank) {
  if (rank < 1 || rank >= options.ranks) {
    return absl::InvalidArgumentError(absl::StrCat("rank must be 1 to ", options.ranks - 1, ", found ", rank));
  }
  if (!failure.ok()) return failure;
  if (streams[rank - 1] != nullptr) return absl::AlreadyExistsError(absl::StrCat("rank ", rank, " is here already"));
  streams[rank - 1] = stream;
  ++ranks_here;
  watchdog.expect(rank, Clock::now());
  changed.notify_all();
  return absl::OkStatus();
}

void RpcWorkerGroup::Impl::answered(Pending* step) {
  if (--step->missing == 0) watchdog.step_ended(Clock::now());
  changed.notify_all();
}

void RpcWorkerGroup::Impl::take_answer(int32_t rank, const wire_v1::Result& result) {
  for (Pending& step : pending) {
    if (step.remote[rank - 1].has_value()) continue;
    if (step.step != result.step()) {
      return fail(absl::UnavailableError(
          absl::StrCat("rank ", rank, " answered step ", result.step(), " when ", step.step, " was its next")));
    }
    step.remote[rank - 1] =
        Answer{.digest = result.sampled_digest(),
               .error = result.error(),
               .timing = {.run_seconds = result.run_seconds(), .collective_seconds = result.collective_seconds()}};
    answered(&step);
    if (step.stop) {
      watchdog.excuse(rank);
      streams[rank - 1]->finish(grpc::Status::OK);
    }
    return;
  }
  fail(absl::UnavailableError(
      absl::StrCat("rank ", rank, " answered step ", result.step(), ", which nobody asked for")));
}

void RpcWorkerGroup::Impl::take_place(int32_t rank, const wire_v1::Place& place) {
  watchdog.heard(rank,
                 {.step = place.step(),
                  .in_step = place.in_step(),
                  .collective = place.collective(),
                  .in_collective = place.in_collective()},
                 Clock::now());
}

// Gives the ranks signs of life and looks for theirs, on a thread of its own: should this one hang, they notice.
void RpcWorkerGroup::Impl::watch() {
  std::unique_lock lock(mutex);
  while (!closed.wait_for(lock, options.watchdog.interval(), [this] { return closing; })) {
    look_after_ranks();
    lock.unlock();
    announce_failure();
    lock.lock();
  }
}

void RpcWorkerGroup::Impl::look_after_ranks() {
  if (!failure.ok()) return;
  const auto sign_of_life = std::make_shared<wire_v1::Plan>();
  sign_of_life->set_sign_of_life(true);
  for (RankStream* stream : streams) {
    if (stream != nullptr) stream->send(sign_of_life);
  }
  const Place own = options.recorder != nullptr ? options.recorder->place() : Place();
  const std::optional<Watchdog::Verdict> verdict = watchdog.check(own, unanswered(), Clock::now());
  if (!verdict) return;
  std::string text = verdict->text;
  for (int rank : verdict->culprits) absl::StrAppend(&text, state_of(rank));
  // First words count: what the owner makes of the status comes later.
  if (verdict->silent && options.recorder != nullptr) options.recorder->last_words(LastWordsKind::kSilent, text);
  fail(verdict->silent ? absl::UnavailableError(text) : absl::DeadlineExceededError(text));
}

std::vector<int> RpcWorkerGroup::Impl::unanswered() const {
  std::vector<int> ranks;
  const auto oldest = std::ranges::find_if(pending, [](const Pending& step) { return step.missing > 0; });
  if (oldest == pending.end()) return ranks;
  if (!oldest->local.has_value()) ranks.push_back(0);
  for (int rank = 1; rank < options.ranks; ++rank) {
    if (!oldest->remote[rank - 1].has_value()) ranks.push_back(rank);
  }
  return ranks;
}

// Of a rank of this node.
std::optional<Flight> RpcWorkerGroup::Impl::flight_of(int32_t rank) const {
  if (options.flight_directory.empty()) return std::nullopt;
  absl::StatusOr<Flight> flight = read_flight(flight_path(options.flight_directory, rank));
  if (!flight.ok() || !flight->here) return std::nullopt;
  return *std::move(flight);
}

std::string RpcWorkerGroup::Impl::last_words_of(int32_t rank) const {
  const std::optional<Flight> flight = flight_of(rank);
  if (!flight) return "the process has ended or hangs";
  if (flight->kind != LastWordsKind::kNone) return absl::StrCat("its last words: ", flight->last_words);
  return absl::StrCat("process ", flight->pid, " left no last words, it was killed");
}

// To be appended to what is said about a silent or stuck rank.
std::string RpcWorkerGroup::Impl::state_of(int32_t rank) const {
  const std::optional<Flight> flight = flight_of(rank);
  return flight && rank != 0 ? absl::StrCat("; process ", flight->pid, " is ", process_state(flight->pid)) : "";
}

// The group is dead from here on: every rank is told why, so that each can end its process.
void RpcWorkerGroup::Impl::fail(absl::Status status) {
  if (!failure.ok()) return;
  failure = std::move(status);
  changed.notify_all();
  for (RankStream* stream : streams) {
    if (stream != nullptr) stream->finish({grpc::StatusCode::UNAVAILABLE, std::string(failure.message())});
  }
}

void RpcWorkerGroup::Impl::announce_failure() {
  absl::Status status;
  {
    const std::lock_guard lock(mutex);
    if (failure.ok() || failure_announced) return;
    failure_announced = true;
    status = failure;
  }
  if (options.on_failure) options.on_failure(status);
}

absl::Status RpcWorkerGroup::Impl::compare(const Pending& pending) const {
  const uint64_t digest = sampled_digest(*pending.local);
  for (size_t i = 0; i < pending.remote.size(); ++i) {
    const Answer& answer = *pending.remote[i];
    if (answer.error.empty() != pending.local->error.empty()) {
      return absl::InternalError(absl::StrCat("rank ", i + 1, " disagrees with rank 0 about step ", pending.step,
                                              ": rank ", i + 1, " says \"",
                                              answer.error.empty() ? "fine" : answer.error, "\", rank 0 says \"",
                                              pending.local->error.empty() ? "fine" : pending.local->error, "\""));
    }
    if (answer.digest != digest) {
      return absl::InternalError(absl::StrCat("rank ", i + 1, " disagrees with rank 0 about step ", pending.step,
                                              ": it sampled other tokens (digest ", absl::Hex(answer.digest), ", not ",
                                              absl::Hex(digest),
                                              "); the ranks' builds or weights differ, or memory failed"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<RpcWorkerGroup>> RpcWorkerGroup::listen(const RpcWorkerGroupOptions& options,
                                                                       WorkerFunction local) {
  OCTET_CHECK(options.ranks >= 1, absl::StrCat("a group of ", options.ranks, " ranks"));
  auto impl = std::make_unique<Impl>(options, std::move(local));
  std::unique_ptr<RpcWorkerGroup> group(new RpcWorkerGroup(std::move(impl)));
  if (options.ranks > 1) {
    if (absl::Status status = group->impl_->start_server(); !status.ok()) return status;
  }
  group->impl_->local_thread = std::thread([impl = group->impl_.get()] { impl->run_local(); });
  if (options.watchdog.floor > Watchdog::Duration::zero()) {
    group->impl_->watch_thread = std::thread([impl = group->impl_.get()] { impl->watch(); });
  }
  return group;
}

RpcWorkerGroup::RpcWorkerGroup(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

RpcWorkerGroup::~RpcWorkerGroup() {
  {
    std::unique_lock lock(impl_->mutex);
    // Whoever submitted the stop plan need not have collected its answers.
    if (impl_->stop_submitted) impl_->changed.wait_for(lock, kStopTimeout, [this] { return impl_->settled(); });
    impl_->closing = true;
    impl_->changed.notify_all();
    impl_->closed.notify_all();
    for (Impl::RankStream* stream : impl_->streams) {
      if (stream != nullptr) stream->finish({grpc::StatusCode::UNAVAILABLE, "rank 0 is ending"});
    }
  }
  for (std::thread* thread : {&impl_->local_thread, &impl_->watch_thread}) {
    if (thread->joinable()) thread->join();
  }
  if (impl_->server != nullptr) {
    impl_->server->Shutdown(absl::ToChronoTime(absl::Now() + absl::Seconds(1)));
    impl_->server->Wait();
    std::unique_lock lock(impl_->mutex);
    impl_->changed.wait(lock, [this] { return impl_->open_streams == 0; });
  }
  impl_->remove_socket();
}

const std::string& RpcWorkerGroup::local_address() const { return impl_->local_address; }
const std::string& RpcWorkerGroup::remote_address() const { return impl_->remote_address; }

absl::Status RpcWorkerGroup::wait_for_ranks(absl::Duration timeout) {
  {
    std::unique_lock lock(impl_->mutex);
    const bool in_time = impl_->changed.wait_for(
        lock, absl::ToChronoMilliseconds(std::min(timeout, absl::Hours(24))),
        [this] { return !impl_->failure.ok() || impl_->ranks_here == impl_->options.ranks - 1; });
    if (!impl_->failure.ok()) return impl_->failure;
    if (!in_time) {
      std::vector<int32_t> absent;
      for (int32_t rank = 1; rank < impl_->options.ranks; ++rank) {
        if (impl_->streams[rank - 1] == nullptr) absent.push_back(rank);
      }
      return absl::DeadlineExceededError(absl::StrCat("after ", absl::FormatDuration(timeout), " rank ",
                                                      absl::StrJoin(absent, ", "), " has not dialled rank 0"));
    }
  }
  impl_->remove_socket();
  return absl::OkStatus();
}

void RpcWorkerGroup::submit(const StepPlan& plan) {
  std::shared_ptr<wire_v1::Plan> wire;
  if (impl_->options.ranks > 1) {
    wire = std::make_shared<wire_v1::Plan>();
    encode(plan, wire.get());
  }
  const std::lock_guard lock(impl_->mutex);
  OCTET_CHECK(!impl_->stop_submitted, "a plan after the stop plan");
  impl_->stop_submitted = plan.stop;
  const int32_t ranks = impl_->options.ranks;
  impl_->pending.push_back({.step = plan.step, .stop = plan.stop, .local = {}, .remote = {}, .missing = ranks});
  impl_->pending.back().remote.resize(ranks - 1);
  impl_->watchdog.step_submitted(plan.step, plan.token_count(), Clock::now());
  if (!impl_->failure.ok()) return;  // collect() says so
  impl_->local_plans.push_back(plan);
  impl_->changed.notify_all();
  for (Impl::RankStream* stream : impl_->streams) {
    if (stream != nullptr) stream->send(wire);
  }
}

absl::StatusOr<StepResult> RpcWorkerGroup::collect() {
  absl::StatusOr<StepResult> answer;
  {
    std::unique_lock lock(impl_->mutex);
    OCTET_CHECK(!impl_->pending.empty(), "collect() without a submitted plan");
    impl_->changed.wait(lock, [this] { return !impl_->failure.ok() || impl_->pending.front().missing == 0; });
    Pending oldest = std::move(impl_->pending.front());
    impl_->pending.pop_front();
    if (impl_->failure.ok()) {
      if (absl::Status status = impl_->compare(oldest); !status.ok()) impl_->fail(std::move(status));
    }
    if (impl_->failure.ok()) {
      answer = *std::move(oldest.local);
      answer->timings.resize(1);
      for (const std::optional<Answer>& remote : oldest.remote) answer->timings.push_back(remote->timing);
    } else {
      answer = impl_->failure;
    }
  }
  impl_->announce_failure();
  return answer;
}

}  // namespace octet
