// The worker group over real gRPC streams, with fake workers: ranks are threads of this process.
#include "coordinator/rpc_worker_group.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/synchronization/notification.h"
#include "octet/internal/v1/worker.grpc.pb.h"

namespace octet {
namespace {

constexpr char kSecret[] = "a-secret-of-this-job";

// A worker that samples a token computed from the plan, so every rank agrees.
StepResult fake_worker(const StepPlan& plan) {
  StepResult result{.step = plan.step, .sampled = {}, .error = {}};
  for (const SlotTokens& run : plan.run) {
    if (!run.sample) continue;
    result.sampled.push_back({.slot = run.slot, .chosen = {run.position + run.count(), -0.5f}, .top = {}});
  }
  return result;
}

StepPlan plan_of(uint64_t step) {
  return {.step = step,
          .close = {},
          .open = {{.slot = 0, .sampling = {}}},
          .blocks = {{.slot = 0, .block = 1}, {.slot = 0, .block = 2}},
          .run = {{.slot = 0,
                   .position = static_cast<int32_t>(step),
                   .tokens = {1, 2, 3},
                   .from_last_sample = false,
                   .sample = true}},
          .stop = false};
}

StepPlan stop_plan(uint64_t step) {
  StepPlan plan;
  plan.step = step;
  plan.stop = true;
  return plan;
}

// Ranks 1.. as threads; each ends with its status.
class Ranks {
 public:
  ~Ranks() { join(); }

  void start(int32_t rank, const std::string& coordinator, WorkerFunction run, const std::string& secret = kSecret) {
    statuses_.push_back(std::make_unique<absl::Status>());
    absl::Status* status = statuses_.back().get();
    threads_.emplace_back([=, this] {
      WorkerServiceOptions options{.coordinator = coordinator,
                                   .rank = rank,
                                   .job_secret = secret,
                                   .connect_timeout = absl::Seconds(30),
                                   .on_lost = [this](const absl::Status&) { ++lost_; },
                                   .silence = silence};
      *status = serve_plans(options, run);
    });
  }
  void join() {
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }
  const absl::Status& status(size_t i) const { return *statuses_[i]; }
  int lost() const { return lost_; }

  absl::Duration silence = absl::ZeroDuration();

 private:
  std::vector<std::thread> threads_;
  std::vector<std::unique_ptr<absl::Status>> statuses_;
  std::atomic<int> lost_{0};
};

struct Group {
  explicit Group(int32_t ranks, WorkerFunction local = fake_worker, bool remote_ranks = false,
                 const WatchdogOptions& watchdog = {}) {
    auto listening = RpcWorkerGroup::listen({.ranks = ranks,
                                             .job_secret = kSecret,
                                             .remote_ranks = remote_ranks,
                                             .host = "127.0.0.1",
                                             .on_failure =
                                                 [this](const absl::Status& status) {
                                                   failure = status;
                                                   failed.Notify();  // a second call would end the test
                                                 },
                                             .watchdog = watchdog},
                                            std::move(local));
    if (!listening.ok()) ADD_FAILURE() << listening.status();
    group = *std::move(listening);
  }
  RpcWorkerGroup* operator->() { return group.get(); }

  absl::Status failure;
  absl::Notification failed;
  std::unique_ptr<RpcWorkerGroup> group;
};

TEST(RpcWorkerGroup, RunsPlansOnEveryRankAndStops) {
  std::atomic<int> steps{0};
  auto counting = [&](const StepPlan& plan) {
    ++steps;
    return fake_worker(plan);
  };
  Group group(3, counting);
  Ranks ranks;
  ranks.start(1, group->local_address(), counting);
  ranks.start(2, group->local_address(), counting);
  ASSERT_TRUE(group->wait_for_ranks(absl::Seconds(30)).ok());

  constexpr int kSteps = 2000;
  const auto begin = std::chrono::steady_clock::now();
  group->submit(plan_of(0));
  for (uint64_t step = 0; step < kSteps; ++step) {
    if (step + 1 < kSteps) group->submit(plan_of(step + 1));  // the next one while this one runs
    absl::StatusOr<StepResult> result = group->collect();
    ASSERT_TRUE(result.ok()) << result.status();
    ASSERT_EQ(result->sampled, fake_worker(plan_of(step)).sampled);
  }
  const auto pipelined = std::chrono::steady_clock::now();
  for (uint64_t step = 0; step < kSteps; ++step) ASSERT_TRUE(group->run(plan_of(step)).ok());
  const auto end = std::chrono::steady_clock::now();
  const auto micros = [](auto span) { return std::chrono::duration<double, std::micro>(span).count() / kSteps; };
  std::printf("cost of an empty step, 3 ranks in one process: %.0f us pipelined, %.0f us one by one\n",
              micros(pipelined - begin), micros(end - pipelined));

  ASSERT_TRUE(group->run(stop_plan(kSteps)).ok());
  ranks.join();
  EXPECT_TRUE(ranks.status(0).ok()) << ranks.status(0);
  EXPECT_TRUE(ranks.status(1).ok()) << ranks.status(1);
  EXPECT_EQ(ranks.lost(), 0);
  EXPECT_EQ(steps, 3 * (2 * kSteps + 1));
  EXPECT_FALSE(group.failed.HasBeenNotified());
}

TEST(RpcWorkerGroup, OfOneRankListensOnNothing) {
  Group group(1);
  EXPECT_EQ(group->local_address(), "");
  EXPECT_EQ(group->remote_address(), "");
  ASSERT_TRUE(group->wait_for_ranks(absl::ZeroDuration()).ok());
  absl::StatusOr<StepResult> result = group->run(plan_of(4));
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(result->sampled, fake_worker(plan_of(4)).sampled);
}

TEST(RpcWorkerGroup, CollectsEachRanksTiming) {
  auto timed = [](double seconds) {
    return [seconds](const StepPlan& plan) {
      StepResult result = fake_worker(plan);
      result.timings = {{.run_seconds = seconds, .collective_seconds = seconds / 4}};
      return result;
    };
  };
  Group group(3, timed(1.0));
  Ranks ranks;
  ranks.start(1, group->local_address(), timed(2.0));
  ranks.start(2, group->local_address(), timed(3.0));
  ASSERT_TRUE(group->wait_for_ranks(absl::Seconds(30)).ok());
  const absl::StatusOr<StepResult> result = group->run(plan_of(0));
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->timings.size(), 3u);
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_EQ(result->timings[rank].run_seconds, 1.0 + rank);
    EXPECT_EQ(result->timings[rank].collective_seconds, (1.0 + rank) / 4);
  }
  EXPECT_TRUE(group->run(stop_plan(1)).ok());
}

TEST(RpcWorkerGroup, ReachesRanksOnOtherNodesOverTcp) {
  Group group(3, fake_worker, /*remote_ranks=*/true);
  Ranks ranks;
  ranks.start(1, group->local_address(), fake_worker);
  ranks.start(2, group->remote_address(), fake_worker);
  ASSERT_TRUE(group->wait_for_ranks(absl::Seconds(30)).ok());
  EXPECT_TRUE(group->run(plan_of(0)).ok());
  EXPECT_TRUE(group->run(stop_plan(1)).ok());
}

TEST(RpcWorkerGroup, KeepsItsSocketPrivateAndRemovesItOnceAllAreIn) {
  Group group(2);
  const std::string path = group->local_address().substr(5);
  struct stat facts {};
  ASSERT_EQ(stat(path.c_str(), &facts), 0) << path;
  EXPECT_EQ(facts.st_mode & 0777, 0600u);
  const std::string directory = path.substr(0, path.rfind('/'));
  ASSERT_EQ(stat(directory.c_str(), &facts), 0);
  EXPECT_EQ(facts.st_mode & 0777, 0700u);

  Ranks ranks;
  ranks.start(1, group->local_address(), fake_worker);
  ASSERT_TRUE(group->wait_for_ranks(absl::Seconds(30)).ok());
  EXPECT_NE(stat(directory.c_str(), &facts), 0);
  EXPECT_TRUE(group->run(stop_plan(0)).ok());
}

TEST(RpcWorkerGroup, NamesTheRankThatDiesInAStepAndTellsTheOthers) {
  absl::Notification let_go;
  auto stuck = [&](const StepPlan& plan) {  // as in an all-reduce whose peer is gone
    if (plan.step == 1) let_go.WaitForNotification();
    return fake_worker(plan);
  };
  Group group(3, stuck);
  // Rank 2 breaks its stream in the middle of step 1 by leaving with a plan unanswered.
  auto channel = grpc::CreateChannel(group->local_address(), grpc::InsecureChannelCredentials());
  auto stub = internal::v1::WorkerService::NewStub(channel);
  grpc::ClientContext context;
  context.AddMetadata("authorization", std::string("Bearer ") + kSecret);
  auto stream = stub->Work(&context);
  internal::v1::RankMessage message;
  message.mutable_hello()->set_rank(2);
  ASSERT_TRUE(stream->Write(message));
  Ranks ranks;
  ranks.start(1, group->local_address(), stuck);
  ASSERT_TRUE(group->wait_for_ranks(absl::Seconds(30)).ok());

  group->submit(plan_of(1));
  internal::v1::Plan plan;
  ASSERT_TRUE(stream->Read(&plan));
  context.TryCancel();
  absl::StatusOr<StepResult> result = group->collect();  // although rank 0's own worker is stuck
  EXPECT_EQ(result.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(absl::StrContains(result.status().message(), "rank 2 is lost")) << result.status();
  group.failed.WaitForNotification();
  EXPECT_EQ(group.failure, result.status());
  EXPECT_EQ(group->run(plan_of(2)).status(), result.status());  // dead for good

  while (ranks.lost() == 0) std::this_thread::yield();  // rank 1 hears of it inside its step
  let_go.Notify();
  ranks.join();
  EXPECT_EQ(ranks.status(0).code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(absl::StrContains(ranks.status(0).message(), "rank 2 is lost")) << ranks.status(0);
  stream->Finish();
}

TEST(RpcWorkerGroup, NoticesALostRankWhileIdle) {
  Group group(2);
  auto channel = grpc::CreateChannel(group->local_address(), grpc::InsecureChannelCredentials());
  auto stub = internal::v1::WorkerService::NewStub(channel);
  grpc::ClientContext context;
  context.AddMetadata("authorization", std::string("Bearer ") + kSecret);
  auto stream = stub->Work(&context);
  internal::v1::RankMessage message;
  message.mutable_hello()->set_rank(1);
  ASSERT_TRUE(stream->Write(message));
  ASSERT_TRUE(group->wait_for_ranks(absl::Seconds(30)).ok());
  context.TryCancel();
  group.failed.WaitForNotification();
  EXPECT_TRUE(absl::StrContains(group.failure.message(), "rank 1 is lost")) << group.failure;
  stream->Finish();
}

// A rank that says Hello and then nothing, as a process does that is stopped.
struct SilentRank {
  SilentRank(const std::string& coordinator, int32_t rank)
      : stub(internal::v1::WorkerService::NewStub(
            grpc::CreateChannel(coordinator, grpc::InsecureChannelCredentials()))) {
    context.AddMetadata("authorization", absl::StrCat("Bearer ", kSecret));
    stream = stub->Work(&context);
    internal::v1::RankMessage message;
    message.mutable_hello()->set_rank(rank);
    EXPECT_TRUE(stream->Write(message));
  }
  ~SilentRank() {
    context.TryCancel();
    stream->Finish();
  }
  std::unique_ptr<internal::v1::WorkerService::Stub> stub;
  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientReaderWriter<internal::v1::RankMessage, internal::v1::Plan>> stream;
};

TEST(RpcWorkerGroup, NamesARankThatGivesNoSignOfLife) {
  Group group(3, fake_worker, false, {.floor = std::chrono::seconds(1)});
  Ranks ranks;
  ranks.silence = absl::Seconds(1);
  ranks.start(1, group->local_address(), fake_worker);
  SilentRank silent(group->local_address(), 2);
  ASSERT_TRUE(group->wait_for_ranks(absl::Seconds(30)).ok());
  group.failed.WaitForNotification();
  EXPECT_EQ(group.failure.code(), absl::StatusCode::kUnavailable) << group.failure;
  EXPECT_TRUE(absl::StrContains(group.failure.message(), "2 gave no sign of life")) << group.failure;
  ranks.join();
  EXPECT_TRUE(absl::StrContains(ranks.status(0).message(), "2 gave no sign of life")) << ranks.status(0);
}

TEST(RpcWorkerGroup, NamesARankThatIsStuckAlthoughItGivesSignsOfLife) {
  absl::Notification let_go;
  auto stuck = [&](const StepPlan& plan) {
    if (plan.step == 3) let_go.WaitForNotification();
    return fake_worker(plan);
  };
  Group group(3, fake_worker, false,
              {.floor = std::chrono::seconds(2), .first = std::chrono::seconds(2), .factor = 20});
  Ranks ranks;
  ranks.silence = absl::Seconds(2);
  ranks.start(1, group->local_address(), fake_worker);
  ranks.start(2, group->local_address(), stuck);
  ASSERT_TRUE(group->wait_for_ranks(absl::Seconds(30)).ok());
  for (uint64_t step = 0; step < 3; ++step) ASSERT_TRUE(group->run(plan_of(step)).ok());
  const absl::StatusOr<StepResult> result = group->run(plan_of(3));
  EXPECT_EQ(result.status().code(), absl::StatusCode::kDeadlineExceeded) << result.status();
  EXPECT_TRUE(absl::StrContains(result.status().message(), "rank 2 is stuck: step 3")) << result.status();
  let_go.Notify();
}

TEST(RpcWorkerGroup, NamesTheRankThatSampledOtherTokens) {
  Group group(3);
  auto wrong = [](const StepPlan& plan) {
    StepResult result = fake_worker(plan);
    if (plan.step == 3) result.sampled[0].chosen.token += 1;
    return result;
  };
  Ranks ranks;
  ranks.start(1, group->local_address(), fake_worker);
  ranks.start(2, group->local_address(), wrong);
  ASSERT_TRUE(group->wait_for_ranks(absl::Seconds(30)).ok());
  for (uint64_t step = 0; step < 3; ++step) ASSERT_TRUE(group->run(plan_of(step)).ok());
  absl::StatusOr<StepResult> result = group->run(plan_of(3));
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(absl::StrContains(result.status().message(), "rank 2 disagrees")) << result.status();
}

TEST(RpcWorkerGroup, PassesOnAFaultThatAllRanksReportAndDiesOfOneThatNotAllDo) {
  auto faulty = [](const StepPlan& plan) {
    StepResult result = fake_worker(plan);
    if (plan.step == 1) result = {.step = 1, .sampled = {}, .error = "NaN in the logits"};
    return result;
  };
  auto worse = [&](const StepPlan& plan) {
    StepResult result = faulty(plan);
    if (plan.step == 2) result = {.step = 2, .sampled = {}, .error = "unknown slot 9"};
    return result;
  };
  Group group(2, faulty);
  Ranks ranks;
  ranks.start(1, group->local_address(), worse);
  ASSERT_TRUE(group->wait_for_ranks(absl::Seconds(30)).ok());
  absl::StatusOr<StepResult> result = group->run(plan_of(1));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->error, "NaN in the logits");
  result = group->run(plan_of(2));
  EXPECT_EQ(result.status().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(absl::StrContains(result.status().message(), "unknown slot 9")) << result.status();
}

TEST(RpcWorkerGroup, RefusesRanksWithoutTheSecretAndRanksItDoesNotExpect) {
  Group group(2);
  Ranks strangers;
  strangers.start(1, group->local_address(), fake_worker, "another-secret");
  strangers.start(2, group->local_address(), fake_worker);
  strangers.start(0, group->local_address(), fake_worker);
  strangers.join();
  EXPECT_EQ(strangers.status(0).code(), absl::StatusCode::kUnauthenticated) << strangers.status(0);
  EXPECT_EQ(strangers.status(1).code(), absl::StatusCode::kInvalidArgument) << strangers.status(1);
  EXPECT_EQ(strangers.status(2).code(), absl::StatusCode::kInvalidArgument) << strangers.status(2);

  absl::Status waited = group->wait_for_ranks(absl::Milliseconds(50));
  EXPECT_EQ(waited.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(absl::StrContains(waited.message(), "rank 1 has not")) << waited;

  Ranks ranks;
  ranks.start(1, group->local_address(), fake_worker);
  ASSERT_TRUE(group->wait_for_ranks(absl::Seconds(30)).ok());
  EXPECT_TRUE(group->run(stop_plan(0)).ok());
}

// The public server's library services register themselves with every gRPC server of a process that links them.
TEST(RpcWorkerGroup, OffersNothingButThePlanStream) {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  Group group(2);
  auto channel = grpc::CreateChannel(group->local_address(), grpc::InsecureChannelCredentials());
  grpc::GenericStub stub(channel);
  for (const char* method :
       {"/grpc.health.v1.Health/Watch", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"}) {
    grpc::CompletionQueue queue;
    void* tag = nullptr;
    bool ok = false;
    grpc::ClientContext context;
    context.AddMetadata("authorization", absl::StrCat("Bearer ", kSecret));
    auto stream = stub.PrepareCall(&context, method, &queue);
    stream->StartCall(nullptr);
    queue.Next(&tag, &ok);
    grpc::Status status;
    stream->Finish(&status, nullptr);
    queue.Next(&tag, &ok);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED) << method;
  }
}

TEST(RpcWorkerGroup, RefusesASecondRankOfTheSameNumberAndKeepsTheFirst) {
  Group group(3);
  Ranks ranks;
  ranks.start(1, group->local_address(), fake_worker);
  while (!absl::StrContains(group->wait_for_ranks(absl::Milliseconds(1)).message(), "rank 2 has not")) {
  }
  Ranks twin;
  twin.start(1, group->local_address(), fake_worker);
  twin.join();
  EXPECT_EQ(twin.status(0).code(), absl::StatusCode::kAlreadyExists) << twin.status(0);
  ranks.start(2, group->local_address(), fake_worker);
  ASSERT_TRUE(group->wait_for_ranks(absl::Seconds(30)).ok());
  EXPECT_TRUE(group->run(plan_of(0)).ok());
  EXPECT_TRUE(group->run(stop_plan(1)).ok());
}

TEST(RpcWorkerGroup, ThatEndsWithoutAStopPlanTellsItsRanks) {
  Ranks ranks;
  {
    Group group(2);
    ranks.start(1, group->local_address(), fake_worker);
    ASSERT_TRUE(group->wait_for_ranks(absl::Seconds(30)).ok());
  }
  ranks.join();
  EXPECT_EQ(ranks.status(0).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ranks.lost(), 1);
}

TEST(RpcWorkerGroup, WaitsForTheStopPlanThatNobodyCollects) {
  Ranks ranks;
  std::atomic<int> stops{0};
  auto slow_to_stop = [&](const StepPlan& plan) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    stops += plan.stop;
    return fake_worker(plan);
  };
  {
    Group group(3, slow_to_stop);
    ranks.start(1, group->local_address(), slow_to_stop);
    ranks.start(2, group->local_address(), slow_to_stop);
    ASSERT_TRUE(group->wait_for_ranks(absl::Seconds(30)).ok());
    group->submit(stop_plan(0));
  }
  ranks.join();
  EXPECT_TRUE(ranks.status(0).ok()) << ranks.status(0);
  EXPECT_TRUE(ranks.status(1).ok()) << ranks.status(1);
  EXPECT_EQ(stops, 3);
}

TEST(ServePlans, GivesUpACoordinatorThatGivesNoSignOfLife) {
  Group group(2);  // without a watchdog rank 0 gives none
  Ranks ranks;
  ranks.silence = absl::Milliseconds(500);
  ranks.start(1, group->local_address(), fake_worker);
  ASSERT_TRUE(group->wait_for_ranks(absl::Seconds(30)).ok());
  ranks.join();
  EXPECT_EQ(ranks.status(0).code(), absl::StatusCode::kUnavailable) << ranks.status(0);
  EXPECT_TRUE(absl::StrContains(ranks.status(0).message(), "rank 0 gave no sign of life")) << ranks.status(0);
  EXPECT_EQ(ranks.lost(), 1);
}

TEST(ServePlans, SaysWhereItFoundNobody) {
  absl::Status status = serve_plans({.coordinator = "unix:/nonexistent/plans.sock",
                                     .rank = 3,
                                     .job_secret = kSecret,
                                     .connect_timeout = absl::Milliseconds(200),
                                     .on_lost = {}},
                                    fake_worker);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(absl::StrContains(status.message(), "/nonexistent/plans.sock")) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "rank 3")) << status;
}

}  // namespace
}  // namespace octet
