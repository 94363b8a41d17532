// cmake --install: one folder that runs wherever it is copied, with nothing but glibc and libstdc++ beneath it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "tests/one_node_slurm.h"
#include "tests/process.h"
#include "tests/random_model.h"

namespace octet {
namespace {

namespace fs = std::filesystem;
using std::chrono::seconds;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::MatchesRegex;
using testing::Pair;

constexpr uintmax_t kMaxPackedBytes = 60'000'000;

// Installed once, then moved: nothing may remember where that was.
class Installation : public testing::Environment {
 public:
  static fs::path folder() { return testing::TempDir() + "octet_bundle_" + std::to_string(getpid()); }
  static fs::path root() { return folder() / "moved"; }

  void SetUp() override {
    fs::remove_all(folder());
    const Finished install =
        run_command({"cmake", "--install", OCTET_BUILD_DIR, "--prefix", folder() / "before"}, {}, seconds(300));
    ASSERT_EQ(install.status, 0) << install.err;
    fs::rename(folder() / "before", root());
  }
  void TearDown() override { fs::remove_all(folder()); }
};
const testing::Environment* const kInstallation = testing::AddGlobalTestEnvironment(new Installation);

class Bundle : public testing::Test {
 protected:
  static fs::path folder() { return Installation::folder(); }
  static fs::path root() { return Installation::root(); }

  // Every program and library of the bundle.
  static std::vector<fs::path> binaries() {
    std::vector<fs::path> found;
    for (const auto& entry : fs::recursive_directory_iterator(root())) {
      if (!entry.is_regular_file()) continue;
      char magic[4] = {};
      std::ifstream(entry.path(), std::ios::binary).read(magic, sizeof magic);
      if (std::string_view(magic, sizeof magic) == "\177ELF") found.push_back(entry.path());
    }
    return found;
  }
};

// The values of one kind in what objdump -p says of a file.
std::vector<std::string> headers_of(const fs::path& file, const std::string& kind) {
  std::vector<std::string> values;
  for (absl::string_view line : absl::StrSplit(run_command({"objdump", "-p", file}).out, '\n')) {
    const std::vector<std::string> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
    if (words.size() == 2 && words[0] == kind) values.push_back(words[1]);
  }
  return values;
}

TEST_F(Bundle, NeedsNoLibraryOutsideItselfButTheSystemsAndThoseOfDevices) {
  const std::regex of_the_system("ld-linux.*|lib(c|m|dl|rt|pthread|resolv|stdc\\+\\+|gcc_s)\\.so.*");
  const std::regex of_devices("lib(cuda|cublas|cublasLt|nccl|ibverbs|rdmacm|efa|fabric|psm|uc|infinipath|numa)[^/]*");
  const auto is_openers_own_affair = [](const fs::path& file) {  // a module is opened where its device is
    return file.filename() == "liboctet_cuda.so" || absl::StrContains(file.string(), "mca_");
  };
  std::vector<std::string> outside;
  for (const fs::path& file : binaries()) {
    for (const std::string& library : headers_of(file, "NEEDED")) {
      if (std::regex_match(library, of_the_system) || fs::exists(root() / "lib" / library)) continue;
      if (is_openers_own_affair(file) && std::regex_match(library, of_devices)) continue;
      outside.push_back(absl::StrCat(file.string(), " needs ", library));
    }
    for (const std::string& path : headers_of(file, "RPATH")) {
      if (!path.starts_with("$ORIGIN/")) outside.push_back(absl::StrCat(file.string(), " looks in ", path));
      EXPECT_TRUE(fs::equivalent(file.parent_path() / path.substr(strlen("$ORIGIN/")), root() / "lib")) << file;
    }
    EXPECT_EQ(headers_of(file, "RPATH").size(), 1u) << file;
    EXPECT_THAT(headers_of(file, "RUNPATH"), IsEmpty()) << file;
  }
  EXPECT_THAT(outside, IsEmpty());
}

TEST_F(Bundle, HoldsNoLibraryOfCuda) {
  const std::regex cuda("lib(cuda|cudart|cublas|cudnn|nccl|nvrtc|nvidia|nvJitLink).*");
  for (const fs::path& file : binaries()) EXPECT_FALSE(std::regex_match(file.filename().string(), cuda)) << file;
}

TEST_F(Bundle, IsSmallEnoughToBeCarriedAround) {
  const fs::path packed = folder() / "octet.tar.zst";
  const Finished tar =
      run_command({"cmake", "-E", "chdir", folder(), "cmake", "-E", "tar", "c", packed, "--zstd", "moved"});
  ASSERT_EQ(tar.status, 0) << tar.err;
  std::printf(
      "the bundle, packed: %.1f MB%s\n", static_cast<double>(fs::file_size(packed)) / 1e6,
      fs::exists(root() / "share/octet/small_checkpoint/model.safetensors") ? "" : ", without the small checkpoint");
  EXPECT_LT(fs::file_size(packed), kMaxPackedBytes);
}

TEST_F(Bundle, StartsWithAnEmptyEnvironment) {
  const Finished version = run_command({"env", "-i", root() / "bin/octet", "--version"});
  EXPECT_EQ(version.status, 0) << version.err;
  EXPECT_THAT(version.out, HasSubstr("octet "));
}

// What gpu_check --build-kernels compiles there.
TEST_F(Bundle, BringsEveryFileThatItsKernelsInclude) {
  const std::regex include("#include \"([^\"]+)\"");
  const fs::path sources = root() / "share/octet/kernels";
  std::vector<std::string> missing;
  for (const auto& entry : fs::recursive_directory_iterator(sources)) {
    std::ifstream file(entry.path());
    std::smatch match;
    for (std::string line; std::getline(file, line);) {
      if (std::regex_match(line, match, include) && !fs::exists(sources / match[1].str())) {
        missing.push_back(absl::StrCat(entry.path().string(), " includes ", match[1].str()));
      }
    }
  }
  EXPECT_THAT(missing, IsEmpty());
}

// Answers two requests on two ranks, with commands before the bundle's mpirun; `here` is the bundle's parent as they
// see it.
void expect_two_ranks_to_answer(const fs::path& folder, const fs::path& here, const std::vector<std::string>& before) {
  fs::remove_all(folder / "job");
  fs::create_directories(folder / "job");
  fs::copy(write_random_model({.hidden_size = 48, .intermediate_size = 76}), folder / "job/model");
  std::ofstream(folder / "job/requests.jsonl")
      << R"({"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"Hello","max_tokens":4}})"
      << "\n"
      << R"({"custom_id":"b","method":"POST","url":"/v1/completions","body":{"prompt":"World","max_tokens":5}})"
      << "\n";
  std::vector<std::string> command = before;
  for (const std::string argument :
       {"env", "-i", "OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1", "PATH=/usr/bin:/bin"}) {
    command.push_back(argument);
  }
  for (const std::string& argument : mpirun(2, {here / "moved/bin/octet", "batch", "--threads", "1", "--max-context",
                                                "64", "--max-sequences", "4", "--model", here / "job/model", "--input",
                                                here / "job/requests.jsonl", "--output", here / "job/answers.jsonl"})) {
    command.push_back(argument == "mpirun" ? (here / "moved/bin/mpirun").string() : argument);
  }
  const Finished batch = run_command(command);
  EXPECT_EQ(batch.status, 0) << batch.out << batch.err;
  std::ifstream answers(folder / "job/answers.jsonl");
  const std::string text((std::istreambuf_iterator<char>(answers)), {});
  EXPECT_THAT(text, HasSubstr("\"custom_id\":\"b\"")) << batch.err;
}

TEST_F(Bundle, RunsRanksWithAnEmptyEnvironment) { expect_two_ranks_to_answer(folder(), folder(), {}); }

// A root directory with a shell, glibc and libstdc++, as far from a build machine as a node may be.
TEST_F(Bundle, RunsRanksWhereThereIsNothingButGlibcAndLibstdcxx) {
  std::vector<std::string> unshare = {"unshare", "--mount"};
  if (run_command({"unshare", "--mount", "true"}).status != 0) unshare.push_back("--map-root-user");
  std::vector<std::string> probe = unshare;
  probe.push_back("true");
  if (run_command(probe).status != 0) GTEST_SKIP() << "SKIPPED: this machine lets nobody unshare mounts";

  const fs::path bare = folder() / "bare";
  for (const char* name : {"proc", "dev", "sys", "tmp", "bundle", "usr/bin", "etc"})
    fs::create_directories(bare / name);
  std::ofstream(bare / "etc/passwd") << "root:x:0:0::/:/bin/bash\n";
  const auto bring = [&](const fs::path& file) {
    fs::create_directories((bare / file.relative_path()).parent_path());
    fs::copy_file(fs::canonical(file), bare / file.relative_path(), fs::copy_options::skip_existing);
  };
  for (const char* program : {"bash", "dirname", "env", "readlink"}) bring(fs::path("/usr/bin") / program);
  std::vector<std::string> files = {"/usr/bin/bash", "/usr/bin/env", "/usr/bin/readlink", root() / "bin/octet"};
  for (const std::string& file : files) {
    const std::vector<std::string> words = absl::StrSplit(run_command({"ldd", file}).out, absl::ByAnyChar(" \n\t"));
    for (const std::string& word : words) {
      if (word.starts_with("/") && !word.starts_with(root().string())) bring(word);
    }
  }
  std::vector<std::string> enter = unshare;
  enter.insert(enter.end(), {"bash", "-ec",
                             "for name in proc dev sys; do mount --rbind /$name $0/$name; done; "
                             "mount --rbind $1 $0/bundle; shift; exec chroot $0 \"$@\"",
                             bare, folder()});
  expect_two_ranks_to_answer(folder(), "/bundle", enter);
}

// srun starts the ranks by itself: nobody sets up Open MPI's surroundings for them.
TEST_F(Bundle, MeetsUnderSrun) {
  if (const std::string missing = OneNodeSlurm::missing(); !missing.empty()) GTEST_SKIP() << "SKIPPED: " << missing;
  const OneNodeSlurm slurm;
  ASSERT_TRUE(slurm.ready());
  const Finished doctor =
      slurm.run({"srun", "--mpi=pmix", "--ntasks=2", "--overcommit", root() / "bin/octet", "doctor"});
  EXPECT_THAT(doctor.out, HasSubstr("ranks 0-1")) << doctor.err;
}

// gpu_check, with a driver that is pretended and the emulation as the module. GTEST_FILTER makes its tests few.
class GpuCheck : public Bundle {
 protected:
  GpuCheck() : tools_(folder() / "tools"), out_(folder() / "report") {
    fs::create_directories(tools_);
    fs::remove_all(out_);
  }

  static void write_script(const fs::path& path, const std::string& text) {
    fs::create_directories(path.parent_path());
    std::ofstream(path) << "#!/bin/bash\n" << text << "\n";
    fs::permissions(path, fs::perms::owner_all);
  }

  // With nvidia-smi doing this, from the installation or another folder like it.
  Finished run(const std::string& nvidia_smi, const std::vector<std::string>& arguments,
               const fs::path& from = root()) const {
    write_script(tools_ / "nvidia-smi", nvidia_smi);
    std::vector<std::string> argv = {from / "launch/gpu_check", "--out", out_};
    argv.insert(argv.end(), arguments.begin(), arguments.end());
    return run_command(argv,
                       {.environment = {{"PATH", absl::StrCat(tools_.string(), ":", std::getenv("PATH"))},
                                        {"GTEST_FILTER", "CudaLinear.HasTheCpusBitsOverOddSizes"}}},
                       seconds(300));
  }
  nlohmann::json report() const {
    std::ifstream file(out_ / "report.json");
    return nlohmann::json::parse(file);
  }
  // The result of each step that was run.
  std::map<std::string, std::string> results() const {
    std::map<std::string, std::string> result;
    const nlohmann::json read = report();
    for (const nlohmann::json& step : read["steps"]) result[step["step"]] = step["result"];
    return result;
  }

  static constexpr const char* kPretendedGpu = "echo 'Pretended \"GPU\", 570.1, 81559 MiB, 9.0'";

 private:
  fs::path tools_, out_;
};

TEST_F(GpuCheck, SaysThatThereIsNoGpu) {
  const Finished check = run("echo 'no devices were found'; exit 6", {});
  EXPECT_EQ(check.status, 3) << check.err;
  EXPECT_THAT(check.err, HasSubstr("there is no GPU here: nvidia-smi says: no devices were found"));
}

TEST_F(GpuCheck, RunsItsStepsAndReportsThem) {
  const std::string model = write_random_model({.hidden_size = 48,
                                                .intermediate_size = 76,
                                                .num_hidden_layers = 1,
                                                .num_attention_heads = 2,
                                                .num_key_value_heads = 2});
  const Finished check = run(kPretendedGpu, {"--module", OCTET_EMULATED_CUDA, "--model", model, "--ranks", "1,2",
                                             "--steps", "environment,kernels,tests,ranks"});
  EXPECT_EQ(check.status, 0) << check.err;
  EXPECT_EQ(report()["device"], "Pretended \"GPU\"");
  EXPECT_EQ(report()["driver"], "570.1");
  EXPECT_THAT(results(), ElementsAre(Pair("environment", "passed"), Pair("kernels", "skipped"), Pair("ranks", "passed"),
                                     Pair("tests", "passed")))
      << check.err;
  const nlohmann::json read = report();
  for (const nlohmann::json& figure : read["figures"]) EXPECT_EQ(figure["measured"], "-") << figure;
}

// An installation whose programs for GPUs are scripts; octet rehearses on the CPU, a small model and short prompts.
class PretendedInstallation : public GpuCheck {
 protected:
  PretendedInstallation() {
    for (const char* file : {"launch/gpu_check", "share/octet/bundle.json"}) {
      fs::create_directories((pretended() / file).parent_path());
      fs::copy_file(root() / file, pretended() / file, fs::copy_options::overwrite_existing);
    }
    write_script(pretended() / "bin/octet", absl::StrCat("octet=", (root() / "bin/octet").string(),
                                                         " config=", write_random_model({}), R"(/config.json
[[ $1 == rehearse ]] || exec "$octet" "$@"
for argument; do
  case $argument in
    cuda) argument=cpu ;;
    llama-*) argument=$config ;;
    4096) argument=16 ;;
  esac
  arguments+=("$argument")
done
exec "$octet" "${arguments[@]}" --rounds 1 --threads 1)"));
    write_script(bench("cuda_bench"), R"(while [[ $1 != --json ]]; do shift; done
cat >"$2" <<'END'
{"linear": [
  {"layer": "405B/8 q k v", "weights": "F8_E4M3", "inputs": "F8_E4M3", "tokens": 1, "rows": [2048, 128, 128],
   "bytes_per_second": 1e12, "share_of_read": 0.5},
  {"layer": "405B/8 q k v", "weights": "F8_E4M3", "inputs": "BF16", "tokens": 1, "rows": [2048, 128, 128],
   "bytes_per_second": 3.1e12, "share_of_read": 0.95},
  {"layer": "405B/8 o", "weights": "F8_E4M3", "inputs": "BF16", "tokens": 1, "rows": [16384],
   "bytes_per_second": 2.96e12, "share_of_read": 0.9}]}
END)");
    write_script(bench("cuda_gemm_bench"), R"(while [[ $1 != --json ]]; do shift; done
cat >"$2" <<'END'
{"gemm": [{"flops_per_second": 1.5e15, "inputs": "F8_E4M3", "layer": "gate up", "tiles_flops_per_second": 1e15,
           "tokens": 4096, "weights": "F8_E4M3"}]}
END)");
    write_script(bench("cuda_attention_bench"), "exit 1");
    write_script(python(), R"([[ $1 != -c ]] || exit 0
echo '{"torch": "2.9", "scaled_mm_gate_up_4096_tflops": 1200.0, "matvec_o_percent_of_read": null}' >"$3")");
  }

  static fs::path pretended() { return folder() / "pretended"; }
  static fs::path bench(const char* name) { return pretended() / "libexec/octet/bench" / name; }
  static fs::path python() { return pretended() / "python"; }

  // What a figure's member says, by the figure.
  std::map<std::string, std::string> figures(const char* member) const {
    std::map<std::string, std::string> values;
    const nlohmann::json read = report();
    for (const nlohmann::json& figure : read["figures"]) values[figure["what"]] = figure[member];
    return values;
  }
};

TEST_F(PretendedInstallation, PutsWhatWasMeasuredBesideTheGoals) {
  const Finished check =
      run(kPretendedGpu, {"--steps", "benchmarks,rehearsal,torch", "--python", python()}, pretended());
  EXPECT_THAT(results(),
              ElementsAre(Pair("benchmarks", "failed"), Pair("rehearsal", "passed"), Pair("torch", "passed")))
      << check.err;
  auto measured = figures("measured");
  for (const char* what : {"405B rank of 8, fbgemm, one sequence, sums left out",
                           "405B rank of 8, all-linear, the same", "8B FP8, one sequence"}) {
    EXPECT_THAT(measured[what], MatchesRegex("[0-9.e-]+ ms")) << what;
  }
  EXPECT_THAT(measured["Decode attention, BF16 cache, 64 sequences of 4,096"],
              MatchesRegex("[0-9.e-]+ % of read bandwidth"));
  EXPECT_EQ(measured["FP8 qkv of 405B, one token"], "95 % of read bandwidth");
  EXPECT_EQ(measured["FP8 down of 405B, one token"], "-");
  EXPECT_EQ(measured["The slowest of these four"], "2960 GB/s");
  EXPECT_EQ(measured["FP8 row-wise GEMM, gate_up of 405B, 4,096 tokens"], "1500 TFLOP/s");
  EXPECT_EQ(figures("times_pytorch")["FP8 row-wise GEMM, gate_up of 405B, 4,096 tokens"], "1.25");
  EXPECT_EQ(figures("pytorch")["FP8 o of 405B, one token"], "-");
}

TEST_F(PretendedInstallation, SaysWhereProcessesMayNotShareAGpu) {
  write_script(pretended() / "libexec/octet/peer_processes", "[[ $2 != 8 ]] || exit 3");
  EXPECT_EQ(run(kPretendedGpu, {"--steps", "peers"}, pretended()).status, 0);
  EXPECT_THAT(report()["steps"][0]["reason"], HasSubstr("CUDA IPC is refused here (8 processes)"));
}

TEST_F(PretendedInstallation, SaysWhereSumsBetweenProcessesAreWrong) {
  write_script(pretended() / "libexec/octet/peer_processes", "[[ $2 != 4 ]] || exit 1");
  EXPECT_EQ(run(kPretendedGpu, {"--steps", "peers"}, pretended()).status, 1);
  EXPECT_EQ(report()["steps"][0]["reason"], "4 processes ended with 1");
}

TEST_F(GpuCheck, GoesOnAfterAStepThatFailed) {
  const Finished check = run(kPretendedGpu, {"--module", "/nowhere.so", "--steps", "environment,kernels"});
  EXPECT_EQ(check.status, 1) << check.err;
  EXPECT_THAT(results(), ElementsAre(Pair("environment", "failed"), Pair("kernels", "failed")));
}

}  // namespace
}  // namespace octet
