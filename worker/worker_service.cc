#include "worker/worker_service.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "octet/internal/v1/worker.grpc.pb.h"
#include "worker/awake_clock.h"
#include "worker/step_wire.h"

namespace octet {
namespace {

namespace wire_v1 = internal::v1;

std::shared_ptr<grpc::Channel> make_channel(const std::string& target) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);  // plans come from rank 0, which is trusted, and a prompt may be long
  // Pings find a peer that hangs without closing its socket; generous, because ranks may share few cores.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);  // a proxy of the environment is not meant for this
  return grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
}

wire_v1::RankMessage sign_of_life(FlightRecorder* recorder) {
  const Place place = recorder != nullptr ? recorder->place() : Place();
  wire_v1::RankMessage message;
  wire_v1::Place* to = message.mutable_place();
  to->set_step(place.step);
  to->set_in_step(place.in_step);
  to->set_collective(place.collective);
  to->set_in_collective(place.in_collective);
  return message;
}

// The stream: reads ahead (plan n+1 arrives while n runs), one write in flight. Every reaction is a gRPC thread's;
// next() and answer() are the worker thread's; signs of life have a thread of their own.
class PlanStream final : public grpc::ClientBidiReactor<wire_v1::RankMessage, wire_v1::Plan> {
 public:
  PlanStream(wire_v1::WorkerService::Stub* stub, const WorkerServiceOptions& options)
      : options_(options), clock_(absl::ToChronoNanoseconds(options.silence / 2), Clock::now()) {
    context_.AddMetadata("authorization", absl::StrCat("Bearer ", options.job_secret));
    stub->async()->Work(&context_, this);
    sending_.mutable_hello()->set_rank(options.rank);
    writing_ = true;
    StartWrite(&sending_);
    StartRead(&receiving_);
    StartCall();
    if (options.silence > absl::ZeroDuration()) watch_ = std::thread([this] { watch(); });
  }

  ~PlanStream() override {
    if (watch_.joinable()) watch_.join();
    const std::lock_guard lock(mutex_);  // OnDone has left its critical section
  }

  // The next plan as it came, or nothing when the stream ended: status() says how.
  std::optional<wire_v1::Plan> next() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !plans_.empty() || done_; });
    if (plans_.empty()) return std::nullopt;
    wire_v1::Plan plan = std::move(plans_.front());
    plans_.pop_front();
    return plan;
  }

  void answer(wire_v1::RankMessage message) {
    const std::lock_guard lock(mutex_);
    if (reading_ended_) return;  // gRPC may be on its way to OnDone, after which nothing may be started
    answers_.push_back(std::move(message));
    write_next();
  }

  // From now on the end of the stream is no loss.
  void expect_end() {
    const std::lock_guard lock(mutex_);
    end_expected_ = true;
  }

  void cancel() { context_.TryCancel(); }

  // Waits for the end.
  absl::Status status() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return done_; });
    return status_;
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      const std::lock_guard lock(mutex_);
      reading_ended_ = true;
      return;
    }
    {
      const std::lock_guard lock(mutex_);
      heard_ = clock_.at(Clock::now());
      if (!receiving_.sign_of_life()) take_plan();
    }
    receiving_.Clear();
    StartRead(&receiving_);
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    writing_ = false;
    if (ok) write_next();
  }

  void OnDone(const grpc::Status& status) override {
    bool lost = false;
    absl::Status result;
    {
      const std::lock_guard lock(mutex_);
      if (silent_) {
        // What the stream says now is our own doing.
      } else if (!status.ok()) {
        status_ = absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                               absl::StrCat("rank ", options_.rank, ": the plan stream from rank 0 (",
                                            options_.coordinator, ") ended: ", status.error_message()));
      } else if (!end_expected_) {
        status_ = absl::UnavailableError(absl::StrCat(
            "rank ", options_.rank, ": the coordinator (rank 0) ended the plan stream before the stop plan"));
      }
      lost = !end_expected_ && !silent_;
      end_expected_ = true;  // watch() has nothing to add
      result = status_;
    }
    if (lost && options_.on_lost) options_.on_lost(result);
    const std::lock_guard lock(mutex_);
    done_ = true;  // last: the owner may destroy this once it is seen
    ended_.notify_one();
    changed_.notify_one();
  }

 private:
  using Clock = std::chrono::steady_clock;

  // REQUIRES: mutex_.
  void take_plan() {
    if (options_.recorder != nullptr) {
      options_.recorder->note(FlightEvent::kPlan, receiving_.step(), static_cast<int64_t>(receiving_.ByteSizeLong()));
    }
    plans_.push_back(std::move(receiving_));
    changed_.notify_one();
  }

  // Gives signs of life and looks for rank 0's, until the stream ends.
  void watch() {
    const auto interval = absl::ToChronoNanoseconds(options_.silence / 10);
    std::unique_lock lock(mutex_);
    heard_ = clock_.at(Clock::now());
    while (!ended_.wait_for(lock, interval, [this] { return done_; })) {
      const auto silence = clock_.at(Clock::now()) - heard_;
      if (silence > absl::ToChronoNanoseconds(options_.silence) - interval && !end_expected_) {
        give_up(silence);
        lock.unlock();
        if (options_.on_lost) options_.on_lost(status_);
        return cancel();
      }
      if (!reading_ended_) {
        answers_.push_back(sign_of_life(options_.recorder));
        write_next();
      }
    }
  }

  // REQUIRES: mutex_.
  void give_up(Clock::duration silence) {
    silent_ = true;
    status_ = absl::UnavailableError(
        absl::StrFormat("rank 0 gave no sign of life for %.1f s: its process is stopped or its node hangs",
                        std::chrono::duration<double>(silence).count()));
    if (options_.recorder != nullptr)
      options_.recorder->last_words(LastWordsKind::kSilent, std::string(status_.message()));
  }

  // REQUIRES: mutex_.
  void write_next() {
    if (writing_ || answers_.empty()) return;
    sending_ = std::move(answers_.front());
    answers_.pop_front();
    writing_ = true;
    StartWrite(&sending_);
  }

  const WorkerServiceOptions& options_;
  grpc::ClientContext context_;
  wire_v1::Plan receiving_;
  std::mutex mutex_;                 // guards what follows
  std::condition_variable changed_;  // for the worker thread
  std::condition_variable ended_;    // for the watch
  std::deque<wire_v1::Plan> plans_;
  std::deque<wire_v1::RankMessage> answers_;
  wire_v1::RankMessage sending_;
  bool writing_ = false;
  bool reading_ended_ = false;
  bool end_expected_ = false;
  bool done_ = false;
  absl::Status status_;
  AwakeClock clock_;
  Clock::time_point heard_;  // the last word of rank 0, by clock_
  bool silent_ = false;      // it has been given up
  std::thread watch_;
};

wire_v1::RankMessage to_answer(const StepResult& result) {
  wire_v1::RankMessage message;
  wire_v1::Result* to = message.mutable_result();
  to->set_step(result.step);
  to->set_sampled_digest(sampled_digest(result));
  to->set_error(result.error);
  if (!result.timings.empty()) {
    to->set_run_seconds(result.timings.front().run_seconds);
    to->set_collective_seconds(result.timings.front().collective_seconds);
  }
  return message;
}

}  // namespace

absl::Status serve_plans(const WorkerServiceOptions& options, const WorkerFunction& run) {
  std::shared_ptr<grpc::Channel> channel = make_channel(options.coordinator);
  if (!channel->WaitForConnected(absl::ToChronoTime(absl::Now() + options.connect_timeout))) {
    return absl::UnavailableError(absl::StrCat("rank ", options.rank, ": the coordinator (rank 0) does not answer at ",
                                               options.coordinator, " within ",
                                               absl::FormatDuration(options.connect_timeout)));
  }
  std::unique_ptr<wire_v1::WorkerService::Stub> stub = wire_v1::WorkerService::NewStub(channel);
  PlanStream stream(stub.get(), options);
  while (std::optional<wire_v1::Plan> wire = stream.next()) {
    absl::StatusOr<StepPlan> plan = decode(*wire);
    if (!plan.ok()) {
      stream.expect_end();
      stream.cancel();
      stream.status().IgnoreError();
      return plan.status();
    }
    if (plan->stop) stream.expect_end();
    stream.answer(to_answer(run(*plan)));
    if (options.recorder != nullptr) options.recorder->note(FlightEvent::kAnswer, plan->step, 0);
    if (plan->stop) break;
  }
  return stream.status();
}

}  // namespace octet
