// launch/slurm on a real Slurm of one node: every job script, through srun and PMIx and through mpirun, and what
// signals, time limits and being queued again do to it. Suites named Long take minutes.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "tests/octet_server.h"
#include "tests/one_node_slurm.h"
#include "tests/pretended_octet.h"
#include "tests/random_model.h"

namespace octet {
namespace {

using nlohmann::json;
using std::chrono::seconds;

std::string contents(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

class Slurm : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string missing = OneNodeSlurm::missing(); !missing.empty()) GTEST_SKIP() << "SKIPPED: " << missing;
    const auto begin = std::chrono::steady_clock::now();
    slurm_.emplace();
    ASSERT_TRUE(slurm_->ready());
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    std::printf("Slurm started in %.1f s\n", took.count());
  }

  struct Submission {
    std::string script;
    std::map<std::string, std::string> variables;
    std::vector<std::string> octet_options = {};
    std::vector<std::string> sbatch_options = {};
  };
  // A script of launch/slurm with two ranks; the job's number.
  std::string submit(Submission submission) {
    submission.variables.insert({"OCTET", OCTET_BINARY});
    std::vector<std::string> arguments = {"--ntasks=2", "--ntasks-per-node=2", "--time=10"};
    arguments.insert(arguments.end(), submission.sbatch_options.begin(), submission.sbatch_options.end());
    arguments.push_back(absl::StrCat(OCTET_LAUNCH_DIR, "/slurm/", submission.script));
    arguments.insert(arguments.end(), submission.octet_options.begin(), submission.octet_options.end());
    return slurm_->submit(arguments, submission.variables);
  }

  void expect_state(const std::string& job, const std::string& state, seconds limit = seconds(60)) const {
    EXPECT_TRUE(slurm_->wait_for(job, "JobState", state, limit)) << slurm_->field(job, "JobState") << log_of(job);
  }
  std::string log_of(const std::string& job) const { return contents(slurm_->path("octet-" + job + ".log")); }

  std::optional<OneNodeSlurm> slurm_;
};

TEST_F(Slurm, SrunWithoutPmixIsToldSo) {
  const Finished alone = slurm_->run({"srun", "--ntasks=2", OCTET_BINARY, "serve", "--model", write_random_model({})});
  EXPECT_GT(alone.status, 0);
  EXPECT_TRUE(absl::StrContains(alone.err, "srun --mpi=pmix")) << alone.err;
}

// ---- Serving --------------------------------------------------------------------------------------------------------

class SlurmServe : public Slurm {
 protected:
  void SetUp() override {
    Slurm::SetUp();
    if (IsSkipped()) return;
    token_file_ = slurm_->path("token");
    std::ofstream(token_file_) << "s3cret\n";
    chmod(token_file_.c_str(), 0600);
  }

  std::string serve(std::map<std::string, std::string> variables) {
    variables.insert({{"MODEL", write_random_model({})}, {"TOKEN_FILE", token_file_}});
    return submit({.script = "serve.sbatch", .variables = variables, .octet_options = {"--kv-memory", "64MiB"}});
  }
  std::string address_file(const std::string& job) const { return slurm_->path("octet-" + job + ".json"); }

  json read_address_file(const std::string& job) const {
    return json::parse(std::ifstream(address_file(job)), nullptr, /*allow_exceptions=*/false);
  }

  void expect_its_address_as_comment(const std::string& job) const {
    const json file = read_address_file(job);
    ASSERT_TRUE(file.is_object()) << log_of(job);
    EXPECT_TRUE(slurm_->wait_for(job, "Comment", "grpc://" + file.value("grpc", ""), seconds(30)))
        << slurm_->field(job, "Comment");
  }

  // A client that knows nothing but the address file.
  void expect_an_answer(const std::string& job) const {
    const Finished answer = slurm_->run({OCTET_BINARY, "generate", "--address-file", address_file(job), "--token-file",
                                         token_file_, "--wait", "60", "--token-ids", "1,2,3", "--max-tokens", "4"});
    EXPECT_EQ(answer.status, 0) << answer.err << log_of(job);
  }

  // A server that is found, says where it is, and drains when it is cancelled.
  void expect_a_service(const std::string& launcher) {
    const std::string job = serve({{"LAUNCHER", launcher}});
    expect_an_answer(job);
    const json file = read_address_file(job);
    ASSERT_TRUE(file.is_object()) << log_of(job);
    std::printf("through %s: %s\n", launcher.c_str(), file.dump().c_str());
    const std::string address = file.at("grpc");
    EXPECT_EQ(file.at("job_id"), job);
    EXPECT_TRUE(file.contains("job_end")) << file;
    EXPECT_FALSE(absl::StartsWith(address, "0.0.0.0")) << "no address for other nodes";
    expect_its_address_as_comment(job);
    EXPECT_TRUE(absl::StrContains(log_of(job), "2 ranks")) << log_of(job);

    EXPECT_EQ(slurm_->run({"scancel", job}).status, 0);
    expect_state(job, "CANCELLED");
    EXPECT_TRUE(slurm_->wait_until_idle(seconds(60)));
    EXPECT_TRUE(absl::StrContains(log_of(job), "drained")) << log_of(job);
    EXPECT_NE(access(address_file(job).c_str(), F_OK), 0) << "a client would look for a server that is gone";
  }

  std::string token_file_;
};

TEST_F(SlurmServe, IsFoundByItsAddressFileAndCommentThroughPmix) { expect_a_service("srun"); }

TEST_F(SlurmServe, IsFoundByItsAddressFileAndCommentThroughMpirun) { expect_a_service("mpirun"); }

using LongSlurmServe = SlurmServe;

TEST_F(LongSlurmServe, ServesOnAfterItsTimeAndAfterALostRankIfAskedTo) {
  const std::string job = serve({{"SERVE_ON", "1"}});
  expect_an_answer(job);
  expect_its_address_as_comment(job);
  // What Slurm does before the time limit.
  EXPECT_EQ(slurm_->run({"scancel", "--batch", "--signal=USR1", job}).status, 0);
  EXPECT_TRUE(slurm_->wait_for(job, "Restarts", "1", seconds(60))) << log_of(job);
  expect_an_answer(job);
  expect_its_address_as_comment(job);
  EXPECT_EQ(slurm_->run({"scancel", "--signal=KILL", job + ".0"}).status, 0);
  EXPECT_TRUE(slurm_->wait_for(job, "Restarts", "2", seconds(60))) << log_of(job);
  expect_an_answer(job);
  // To the ranks alone this is the end that somebody wants.
  EXPECT_EQ(slurm_->run({"scancel", "--signal=USR1", job}).status, 0);
  expect_state(job, "COMPLETED");
}

// ---- What becomes of exit statuses ----------------------------------------------------------------------------------

class SlurmExitStatus : public Slurm {
 protected:
  // batch.sbatch with a program that only ends as it is told.
  std::string submit_pretended(const PretendedOctet& octet) {
    return submit(
        {.script = "batch.sbatch",
         .variables = {
             {"OCTET", octet.path()}, {"MODEL", "model"}, {"INPUT", "requests"}, {"OUTPUT", octet.output()}}});
  }
};

TEST_F(SlurmExitStatus, ErrorsInLinesCompleteAJobAndConfigurationMistakesFailItForGood) {
  const PretendedOctet with_errors({{.lines = 9, .status = 3}}), mistaken({{.lines = 0, .status = 78}});
  const std::string complete = submit_pretended(with_errors), failed = submit_pretended(mistaken);
  expect_state(complete, "COMPLETED");  // jobs that depend on it may start
  expect_state(failed, "FAILED");
  EXPECT_EQ(slurm_->field(failed, "ExitCode"), "78:0");
  EXPECT_EQ(slurm_->field(failed, "Restarts"), "0");
}

TEST_F(SlurmExitStatus, ASrunThatEndsWellWithoutARankIsQueuedAgain) {
  const PretendedOctet octet({{.lines = 9, .status = 0}});
  // What a killed step may leave behind is in PMIx's way.
  std::filesystem::create_directory(slurm_->path("spmix_appdir_0_1.0"));
  const std::string job = submit_pretended(octet);
  EXPECT_TRUE(slurm_->wait_for(job, "Restarts", "1", seconds(60))) << log_of(job);
  EXPECT_EQ(octet.starts(), 0);
}

using LongSlurmExitStatus = SlurmExitStatus;

TEST_F(LongSlurmExitStatus, OnlyTheTaskOfAnArrayThatComesBackIsQueuedAgain) {
  const PretendedOctet octet({{.lines = 9, .status = 0}, {.lines = 1, .status = 75}, {.lines = 9, .status = 0}});
  // The second task is the last to start, and those have the array's number as their own.
  const std::string array = submit(
      {.script = "array.sbatch",
       .variables = {{"OCTET", octet.path()}, {"MODEL", "model"}, {"INPUT", "/dev/null"}, {"OUTPUT", octet.output()}},
       .sbatch_options = {"--array=0-1%1", "--ntasks=1", "--ntasks-per-node=1"}});
  EXPECT_TRUE(slurm_->wait_until_idle(seconds(120)));
  EXPECT_EQ(octet.starts(), 3);
  for (const char* task : {"_0", "_1"}) EXPECT_EQ(slurm_->field(array + task, "JobState"), "COMPLETED");
  EXPECT_EQ(slurm_->field(array + "_1", "Restarts"), "1");
}

TEST_F(LongSlurmExitStatus, AJobWhoseThreeMoreStartsBringNoLineGivesUp) {
  const PretendedOctet octet({{.lines = 5, .status = 75}});
  const std::string job = submit_pretended(octet);
  expect_state(job, "FAILED", seconds(300));
  EXPECT_EQ(slurm_->field(job, "ExitCode"), "75:0");
  EXPECT_EQ(slurm_->field(job, "Restarts"), "3");
}

// ---- Batches --------------------------------------------------------------------------------------------------------

class SlurmBatch : public Slurm {
 protected:
  void SetUp() override {
    Slurm::SetUp();
    if (!IsSkipped()) model_ = write_random_model({});
  }

  void write_requests(int lines, int tokens = 50) {
    lines_ = lines;
    std::ofstream file(input());
    for (int i = 0; i < lines; ++i) {
      const json body = {
          {"prompt", absl::StrCat("abc", i)}, {"max_tokens", tokens - 20 + i % 40}, {"ignore_eos", true}};
      file << json{{"custom_id", absl::StrCat("r", i)}, {"method", "POST"}, {"url", "/v1/completions"}, {"body", body}}
           << "\n";
    }
  }
  std::string input() const { return slurm_->path("requests.jsonl"); }
  std::string output() const { return slurm_->path("answers.jsonl"); }

  // The job that the scripts submit; one sequence at a time leaves others time to disturb it.
  Submission batch(const std::string& script, const std::string& launcher) const {
    return {.script = script,
            .variables = {{"MODEL", model_}, {"INPUT", input()}, {"OUTPUT", output()}, {"LAUNCHER", launcher}},
            .octet_options = {"--kv-memory", "64MiB", "--max-sequences", "1"}};
  }

  // The answers to the same requests, without Slurm, in one go and in other company: the same to the byte.
  std::string undisturbed(const std::string& created) const {
    const std::string path = slurm_->path("undisturbed.jsonl");
    const Finished run = slurm_->run(mpirun(1, {OCTET_BINARY, "batch", "--model", model_, "--input", input(),
                                                "--output", path, "--created", created, "--kv-memory", "64MiB"}));
    EXPECT_EQ(run.status, 0) << run.err;
    return contents(path);
  }

  std::string submit_batch(const std::string& launcher, const std::vector<std::string>& sbatch_options = {}) {
    Submission submission = batch("batch.sbatch", launcher);
    submission.octet_options.insert(submission.octet_options.end(), {"--created", kCreated});
    submission.sbatch_options = sbatch_options;
    return submit(submission);
  }
  void expect_completed(const std::string& job) {
    expect_state(job, "COMPLETED", seconds(600));
    EXPECT_EQ(contents(output()), undisturbed(kCreated)) << log_of(job);
  }

  int lines_done() const {
    const json status = json::parse(std::ifstream(output() + ".octet/status.json"), nullptr, false);
    return status.is_object() ? status.value("lines_done", 0) : 0;
  }
  void expect_progress(const std::string& job) const {
    EXPECT_TRUE(wait_until([&] { return lines_done() > 0; }, seconds(120))) << log_of(job);
  }
  void expect_restart(const std::string& job) const {
    EXPECT_TRUE(slurm_->wait_for(job, "Restarts", "1", seconds(120))) << log_of(job);
    std::printf("queued again after %d of %d lines\n", lines_done(), lines_);
  }

  void queue_again_in_the_middle(const std::string& launcher, int ranks) {
    write_requests(40);
    Submission submission = batch("batch.sbatch", launcher);
    // Slow, so that there is a middle however fast the machine is.
    submission.octet_options = {"--kv-memory",      "64MiB",     "--max-sequences", "4", "--inject-fault",
                                "step=1,kind=slow", "--created", kCreated};
    submission.sbatch_options = {absl::StrCat("--ntasks=", ranks), absl::StrCat("--ntasks-per-node=", ranks)};
    const std::string job = submit(submission);
    expect_progress(job);
    EXPECT_EQ(slurm_->run({"scontrol", "requeue", job}).status, 0);
    expect_restart(job);
    expect_completed(job);
    EXPECT_TRUE(absl::StrContains(log_of(job), ", run 2")) << log_of(job);
  }

  static constexpr char kCreated[] = "1800000000";
  std::string model_;
  int lines_ = 0;
};

TEST_F(SlurmBatch, AnswersThroughMpirun) {
  write_requests(20);
  expect_completed(submit_batch("mpirun"));
}

// One rank: on a machine that is busy with other things two wait for one another most of the time.
TEST_F(SlurmBatch, QueuedAgainInTheMiddleGivesTheSameBytes) { queue_again_in_the_middle("srun", 1); }

TEST_F(SlurmBatch, ShardsOfAnArrayJoinToTheSameBytes) {
  write_requests(30);
  Submission submission = batch("array.sbatch", "srun");
  submission.sbatch_options = {"--array=0-2"};
  const std::string array = submit(submission);
  const std::string merge = absl::StrCat(OCTET_BINARY, " batch merge --output ", output(), " ", output(), ".shard-0 ",
                                         output(), ".shard-1 ", output(), ".shard-2");
  const std::string joined =
      slurm_->submit({"--dependency=afterok:" + array, "--output=octet-%j.log", "--wrap", merge});
  expect_state(joined, "COMPLETED", seconds(120));
  struct stat facts = {};
  ASSERT_EQ(stat(input().c_str(), &facts), 0);
  EXPECT_EQ(contents(output()), undisturbed(absl::StrCat(facts.st_mtime))) << log_of(joined);
}

using LongSlurmBatch = SlurmBatch;

TEST_F(LongSlurmBatch, QueuedAgainInTheMiddleGivesTheSameBytesThroughPmix) { queue_again_in_the_middle("srun", 2); }

TEST_F(LongSlurmBatch, QueuedAgainInTheMiddleGivesTheSameBytesThroughMpirun) { queue_again_in_the_middle("mpirun", 2); }

TEST_F(LongSlurmBatch, GoesOnAfterAMoreUrgentJobTookItsNode) {
  write_requests(150);
  const std::string job = submit_batch("srun", {"--exclusive"});
  expect_progress(job);
  const std::string urgent =
      slurm_->submit({"--partition=high", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"});
  expect_restart(job);
  expect_state(urgent, "COMPLETED");
  expect_completed(job);
}

TEST_F(LongSlurmBatch, GoesOnAfterARankWasKilled) {
  for (const char* launcher : {"srun", "mpirun"}) {
    write_requests(150);
    const std::string job = submit_batch(launcher);
    expect_progress(job);
    const Finished killed =
        slurm_->run({"pkill", "--signal", "KILL", "--newest", "--full", "octet batch.*" + output()});
    EXPECT_EQ(killed.status, 0);
    expect_restart(job);
    expect_completed(job);
    for (const char* end : {"", ".octet", ".provenance.json"}) std::filesystem::remove_all(output() + end);
  }
}

TEST_F(LongSlurmBatch, CompletesInTheThirdTimeWhenTwoAreTooShort) {
  write_requests(2000, 200);
  // However fast the machine is, one sequence at a time does not get far in a minute; the third time may be quick.
  const std::string patient = slurm_->path("patient_octet");
  std::ofstream(patient) << "#!/bin/sh\nsequences=1\n[ \"${SLURM_RESTART_COUNT:-0}\" -lt 2 ] || sequences=64\n"
                         << "exec " << OCTET_BINARY << " \"$@\" --max-sequences $sequences\n";
  chmod(patient.c_str(), 0755);
  Submission submission = batch("batch.sbatch", "srun");
  submission.variables["OCTET"] = patient;
  submission.octet_options = {"--kv-memory", "64MiB", "--created", kCreated};
  submission.sbatch_options = {"--time=1", "--signal=B:USR1@25"};
  const std::string job = submit(submission);
  EXPECT_TRUE(slurm_->wait_for(job, "Restarts", "2", seconds(300))) << log_of(job);
  EXPECT_EQ(slurm_->run({"scontrol", "update", "JobId=" + job, "TimeLimit=60"}).status, 0);
  std::printf("%d of %d lines in two minutes that were too short\n", lines_done(), lines_);
  expect_completed(job);
  EXPECT_TRUE(absl::StrContains(log_of(job), "SIGUSR1: the ranks drain")) << log_of(job);
  EXPECT_TRUE(absl::StrContains(log_of(job), "run 3")) << log_of(job);
}

}  // namespace
}  // namespace octet
