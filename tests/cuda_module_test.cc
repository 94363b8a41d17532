// Opening the CUDA module: each way in which it can fail is a sentence with a remedy, and the binary says it and exits.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/cuda/open_module.h"
#include "tests/process.h"
#include "tests/random_model.h"

namespace octet {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr int kServeRefused = 1, kBatchRefused = 78;

std::string module_named(const std::string& name) { return std::string(OCTET_FAKE_MODULES) + "/lib" + name + ".so"; }

std::string error_of_opening(const std::string& path) {
  return std::string(cuda::open_module(path).status().message());
}

TEST(CudaModule, ThatIsMissingNamesItsPlaceAndTheRemedy) {
  const auto module = cuda::open_module("/nowhere/liboctet_cuda.so");
  EXPECT_EQ(module.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(module.status().message()),
              AllOf(HasSubstr("/nowhere/liboctet_cuda.so"), HasSubstr("OCTET_CUDA=ON"), HasSubstr("--device cpu")));
}

TEST(CudaModule, ThatIsNoLibraryOrAnotherOneIsRefused) {
  const std::string path = testing::TempDir() + "octet_not_a_library_" + std::to_string(getpid()) + ".so";
  std::ofstream(path) << "text";
  EXPECT_THAT(error_of_opening(path), AllOf(HasSubstr("does not load"), HasSubstr(path)));
  std::filesystem::remove(path);
  EXPECT_THAT(error_of_opening("/lib/x86_64-linux-gnu/libc.so.6"), HasSubstr("has no octet_cuda_module()"));
}

TEST(CudaModule, OfAnotherInterfaceIsRefusedWithBothNumbers) {
  EXPECT_THAT(error_of_opening(module_named("fake_cuda_of_another_build")),
              AllOf(HasSubstr("has interface 999, this binary " + std::to_string(cuda::kModuleAbi)),
                    HasSubstr("of one build")));
}

TEST(CudaModule, WithoutAGpuSaysWhyAndWhatToDo) {
  const auto module = cuda::open_module(module_named("fake_cuda_without_gpu"));
  ASSERT_TRUE(module.ok()) << module.status();
  EXPECT_THAT(std::string(cuda::check_device(**module, 0).message()),
              AllOf(HasSubstr("the driver is missing"), HasSubstr("nvidia-smi"), HasSubstr("--device cpu")));
}

TEST(CudaModule, RefusesAGpuThatIsTooOldOrNotThere) {
  const auto module = cuda::open_module(module_named("fake_cuda_with_old_gpu"));
  ASSERT_TRUE(module.ok()) << module.status();
  EXPECT_THAT(std::string(cuda::check_device(**module, 0).message()),
              AllOf(HasSubstr("Old Card"), HasSubstr("7.5"), HasSubstr("8.0")));
  EXPECT_THAT(std::string(cuda::check_device(**module, 1).message()),
              AllOf(HasSubstr("GPU 1"), HasSubstr("1 are visible"), HasSubstr("CUDA_VISIBLE_DEVICES")));
}

#ifdef OCTET_BINARY
// The binary in a folder of its own, where each test puts the module that it wants.
class Binary : public testing::Test {
 protected:
  Binary() : folder_(testing::TempDir() + "octet_device_" + std::to_string(getpid())) {
    std::filesystem::create_directories(folder_);
    std::filesystem::copy_file(OCTET_BINARY, folder_ / "octet");
  }
  ~Binary() override { std::filesystem::remove_all(folder_); }

  const std::filesystem::path& folder() const { return folder_; }
  void place(const std::string& module) {
    std::filesystem::copy_file(module_named(module), folder_ / "liboctet_cuda.so");
  }
  Finished run(const std::string& command, const std::vector<std::string>& arguments = {}) const {
    std::vector<std::string> argv = {folder_ / "octet", command, "--model", "no-model", "--device", "cuda"};
    argv.insert(argv.end(), arguments.begin(), arguments.end());
    return run_command(argv, mpirun_environment());
  }

 private:
  std::filesystem::path folder_;
};

TEST_F(Binary, ServesAndBatchesNothingWithoutTheModule) {
  const Finished serve = run("serve");
  EXPECT_EQ(serve.status, kServeRefused) << serve.err;
  EXPECT_THAT(serve.err, HasSubstr("liboctet_cuda.so is not there"));
  const Finished batch = run("batch", {"--input", "no-input", "--output", "no-output"});
  EXPECT_EQ(batch.status, kBatchRefused) << batch.err;
  EXPECT_THAT(batch.err, HasSubstr("liboctet_cuda.so is not there"));
}

TEST_F(Binary, LooksForTheModuleBesideItselfAndSaysThatThereIsNoGpu) {
  place("fake_cuda_without_gpu");
  const Finished serve = run("serve");
  EXPECT_EQ(serve.status, kServeRefused) << serve.err;
  EXPECT_THAT(serve.err, HasSubstr("no GPU can be used: the driver is missing"));
}

TEST_F(Binary, RefusesAModuleOfAnotherBuild) {
  place("fake_cuda_of_another_build");
  const Finished serve = run("serve");
  EXPECT_EQ(serve.status, kServeRefused) << serve.err;
  EXPECT_THAT(serve.err, HasSubstr("has interface 999"));
}

TEST_F(Binary, RefusesAnAllReduceOfGpusOnCpus) {
  const Finished serve =
      run_command({folder() / "octet", "serve", "--model", "no-model", "--allreduce", "p2p"}, mpirun_environment());
  EXPECT_EQ(serve.status, kServeRefused) << serve.err;
  EXPECT_THAT(serve.err, AllOf(HasSubstr("--allreduce p2p is how GPUs sum"), HasSubstr("add --device cuda")));
}

TEST_F(Binary, AnswersOnEmulatedGpusWhatItAnswersOnTheCpu) {
  place("emulated_cuda");
  const std::string model = write_random_model({.hidden_size = 48, .intermediate_size = 76});
  const std::string input = folder() / "requests.jsonl";
  std::ofstream(input)
      << R"({"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"Hello","max_tokens":4,"temperature":0}}
{"custom_id":"b","method":"POST","url":"/v1/completions","body":{"prompt":"World","max_tokens":5,"logprobs":2}}
)";
  const auto answers_on = [&](const std::string& device, int ranks) {
    const std::string output = folder() / (device + std::to_string(ranks) + ".jsonl");
    const Finished batch =
        run_command(mpirun(ranks, {folder() / "octet", "batch", "--model",   model,        "--device",      device,
                                   "--allreduce",      "host",  "--threads", "1",          "--max-context", "64",
                                   "--max-sequences",  "4",     "--created", "1700000000", "--input",       input,
                                   "--output",         output}),
                    mpirun_environment());
    EXPECT_EQ(batch.status, 0) << batch.err;
    // Ranks that meet in the host's memory are nothing that a graph could wait for; one that is alone meets nobody.
    const bool recorded = batch.err.find("run as CUDA graphs") != std::string::npos;
    EXPECT_EQ(recorded, device == "cuda" && ranks == 1) << batch.err;
    // Who answered is part of a line, what was answered must be the same.
    std::vector<nlohmann::json> choices;
    std::ifstream lines(output);
    for (std::string line; std::getline(lines, line);) {
      choices.push_back(nlohmann::json::parse(line)["response"]["body"]["choices"]);
    }
    return choices;
  };
  const std::vector<nlohmann::json> on_cpu = answers_on("cpu", 1);
  EXPECT_EQ(on_cpu.size(), 2u);
  EXPECT_EQ(answers_on("cuda", 1), on_cpu);
  EXPECT_EQ(answers_on("cuda", 2), on_cpu);
}
#endif

}  // namespace
}  // namespace octet
