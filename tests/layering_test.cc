// Walks every #include of the tree and fails on one that goes up a layer or names a library outside its place.
// Also looks at what this program, which links the whole core, has loaded: neither gRPC nor MPI.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <optional>
#include <regex>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace octet {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

// What a file may include: a layer includes itself and the layers after it in this list.
const std::vector<std::string> kLayers = {"launch", "coordinator", "worker", "kernels"};

struct Library {
  std::string name;
  std::regex include;  // as written between the quotes or angle brackets
  std::regex places;   // files that may include it
};

// Tests stand outside the layers and may reach for what they test.
const std::vector<Library>& libraries() {
  static const std::vector<Library> kLibraries = {
      {"MPI", std::regex("mpi\\.h|mpi-ext\\.h"),
       std::regex("launch/bootstrap.*|worker/collective/mpi_communicator.*|tests/.*")},
      {"NCCL", std::regex("nccl.*\\.h"), std::regex("worker/collective/nccl_abi_check\\.cc|tests/.*")},
      {"CUDA", std::regex("(cuda|cublas|cudnn|nvtx|cub/|cute/|cutlass|driver_types|vector_types).*"),
       std::regex("kernels/cuda/.*|worker/collective/cuda_ipc_communicator.*|tests/.*")},
      {"gRPC", std::regex("(grpc|grpcpp|grpc\\+\\+)/.*|.*\\.grpc\\.pb\\.h"),
       std::regex("worker/worker_service.*|coordinator/(rpc_.*|.*_service|.*_call|token_auth|server.*)\\..*|launch/"
                  ".*|tests/.*")},
      {"protobuf", std::regex("google/(protobuf|rpc)/.*|.*\\.pb\\.h"),
       std::regex("worker/(worker_service|step_wire).*|"
                  "coordinator/(rpc_.*|.*_service|token_auth|server.*|generate_.*|openai_.*|batch_line|batch/"
                  "batch_runner)\\..*|launch/.*|tests/.*")},
      {"prometheus-cpp", std::regex("prometheus/.*|civetweb\\.h|CivetServer\\.h"),
       std::regex("coordinator/metrics\\..*|tests/.*")},
      {"PCRE2", std::regex("pcre2.*\\.h"), std::regex("coordinator/text/.*|tests/.*")},
      {"spdlog", std::regex("spdlog/.*"), std::regex("launch/log\\..*|tests/.*")},
      {"libsodium", std::regex("sodium.*"), std::regex("coordinator/prefix_index\\..*|coordinator/batch.*|tests/.*")},
      {"CLI11", std::regex("CLI/.*"), std::regex("launch/.*|tests/.*")},
  };
  return kLibraries;
}

// Two headers are contracts so narrow that what they may include of ours is listed.
std::optional<std::set<std::string>> own_includes_allowed(const std::string& file) {
  if (file == "worker/step_plan.h") return std::set<std::string>{};
  if (file == "coordinator/scheduler.h") {
    return std::set<std::string>{"coordinator/request.h", "coordinator/block_pool.h", "coordinator/prefix_index.h",
                                 "worker/step_plan.h"};
  }
  return std::nullopt;
}

// The place of a path's folder in kLayers, or -1.
int layer_of(const std::string& path) {
  const std::string folder = path.substr(0, path.find('/'));
  const auto found = std::find(kLayers.begin(), kLayers.end(), folder);
  return path.find('/') == std::string::npos || found == kLayers.end() ? -1 : static_cast<int>(found - kLayers.begin());
}

// What is wrong with `file` (a path from the root) including `include`; nullopt if nothing is.
std::optional<std::string> violation(const std::string& file, const std::string& include) {
  const std::string sentence = file + " includes " + include + ": ";
  for (const Library& library : libraries()) {
    if (std::regex_match(include, library.include) && !std::regex_match(file, library.places)) {
      return sentence + library.name + " has no place there";
    }
  }
  if (include.find("../") != std::string::npos) return sentence + "paths are written from the root";
  const int from = layer_of(file), to = layer_of(include);
  if (from >= 0 && to >= 0 && to < from) {
    return sentence + kLayers[from] + " lies below " + kLayers[to] + " and must not know of it";
  }
  if (from >= 0 && include.starts_with("tests/")) return sentence + "the product does not include tests";
  const auto allowed = own_includes_allowed(file);
  if (allowed && to >= 0 && !allowed->contains(include)) return sentence + "this contract includes less than that";
  return std::nullopt;
}

std::vector<std::string> includes_of(const std::filesystem::path& path) {
  static const std::regex kInclude(R"(^\s*#\s*include(_next)?\s*[<"]([^>"]+)[>"].*)");
  std::vector<std::string> includes;
  std::ifstream in(path);
  std::smatch match;
  for (std::string line; std::getline(in, line);) {
    if (std::regex_match(line, match, kInclude)) includes.push_back(match[2]);
  }
  return includes;
}

// Source files of the layers and the tests, as paths from the root.
std::vector<std::string> source_files() {
  static const std::set<std::string> kSource = {".h", ".cc", ".cu", ".cuh", ".inc"};
  const std::filesystem::path root(OCTET_SOURCE_DIR);
  std::vector<std::string> files;
  for (const char* folder : {"launch", "coordinator", "worker", "kernels", "tests"}) {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(root / folder)) {
      if (entry.is_regular_file() && kSource.contains(entry.path().extension().string())) {
        files.push_back(std::filesystem::relative(entry.path(), root).generic_string());
      }
    }
  }
  return files;
}

// The scheduler is pure: nothing it reaches, however indirectly, may bring a clock, a thread, a socket or a device.
std::vector<std::string> impure_includes_reached_from(const std::string& start) {
  static const std::regex kImpure(
      "chrono|ctime|time\\.h|thread|mutex|atomic|future|condition_variable|random|iostream|fstream|filesystem|"
      "unistd\\.h|pthread\\.h|signal\\.h|sys/.*|absl/(time|synchronization|random)/.*|kernels/(?!check\\.h).*|worker/"
      "(worker|batch|"
      "kv_cache|model|collective|checkpoint).*");
  std::vector<std::string> queue = {start}, impure;
  std::set<std::string> seen = {start};
  while (!queue.empty()) {
    const std::string file = queue.back();
    queue.pop_back();
    for (const std::string& include : includes_of(std::filesystem::path(OCTET_SOURCE_DIR) / file)) {
      if (std::regex_match(include, kImpure)) impure.push_back(file + " includes " + include);
      if (layer_of(include) >= 0 && seen.insert(include).second) queue.push_back(include);
    }
  }
  return impure;
}

TEST(Layering, EveryIncludeGoesDownAndEveryLibraryStaysInItsPlace) {
  const std::vector<std::string> files = source_files();
  ASSERT_GT(files.size(), 10u) << "the walk over " << OCTET_SOURCE_DIR << " found too little to mean anything";
  int includes = 0;
  for (const std::string& file : files) {
    for (const std::string& include : includes_of(std::filesystem::path(OCTET_SOURCE_DIR) / file)) {
      ++includes;
      if (const auto wrong = violation(file, include)) ADD_FAILURE() << *wrong;
    }
  }
  std::printf("%zu files, %d includes\n", files.size(), includes);
}

TEST(Layering, TheSchedulerReachesNoClockThreadSocketOrDevice) {
  EXPECT_THAT(impure_includes_reached_from("coordinator/scheduler.h"), IsEmpty());
  if (std::filesystem::exists(std::filesystem::path(OCTET_SOURCE_DIR) / "coordinator/scheduler.cc")) {
    EXPECT_THAT(impure_includes_reached_from("coordinator/scheduler.cc"), IsEmpty());
  }
}

TEST(Layering, RefusesAnIncludeThatGoesUp) {
  EXPECT_TRUE(violation("kernels/ops.cc", "worker/worker.h"));
  EXPECT_TRUE(violation("worker/worker.h", "coordinator/request.h"));
  EXPECT_TRUE(violation("coordinator/engine.cc", "launch/options.h"));
  EXPECT_TRUE(violation("worker/worker.cc", "../coordinator/request.h"));
  EXPECT_TRUE(violation("worker/worker.cc", "tests/fakes.h"));
  EXPECT_FALSE(violation("launch/main.cc", "coordinator/engine.h"));
  EXPECT_FALSE(violation("coordinator/engine.h", "worker/step_plan.h"));
  EXPECT_FALSE(violation("worker/worker.cc", "worker/batch.h"));
  EXPECT_FALSE(violation("kernels/ops.cc", "vector"));
}

TEST(Layering, RefusesALibraryOutsideItsPlace) {
  EXPECT_TRUE(violation("worker/worker.cc", "mpi.h"));
  EXPECT_TRUE(violation("launch/serve.cc", "mpi.h"));
  EXPECT_TRUE(violation("worker/collective/mpi_communicator.cc", "nccl.h"));
  EXPECT_TRUE(violation("kernels/cpu/matmul.cc", "cuda_runtime.h"));
  EXPECT_TRUE(violation("worker/worker.cc", "cublasLt.h"));
  EXPECT_TRUE(violation("coordinator/engine.cc", "grpcpp/grpcpp.h"));
  EXPECT_TRUE(violation("worker/step_wire.cc", "octet/internal/v1/worker.grpc.pb.h"));
  EXPECT_TRUE(violation("coordinator/scheduler.cc", "octet/v1/types.pb.h"));
  EXPECT_TRUE(violation("coordinator/generate_request.cc", "grpcpp/grpcpp.h"));
  EXPECT_TRUE(violation("coordinator/text/tokenizer.cc", "CLI/CLI.hpp"));
  EXPECT_TRUE(violation("coordinator/engine.cc", "pcre2.h"));
  EXPECT_TRUE(violation("coordinator/engine.cc", "prometheus/counter.h"));
  EXPECT_FALSE(violation("launch/bootstrap.cc", "mpi.h"));
  EXPECT_FALSE(violation("worker/collective/mpi_communicator.cc", "mpi.h"));
  EXPECT_FALSE(violation("worker/step_wire.cc", "octet/internal/v1/worker.pb.h"));
  EXPECT_FALSE(violation("coordinator/inference_service.cc", "grpcpp/grpcpp.h"));
  EXPECT_FALSE(violation("coordinator/metrics.cc", "prometheus/exposer.h"));
  EXPECT_FALSE(violation("kernels/cuda/matmul.cu", "cuda_fp8.h"));
}

TEST(Layering, RefusesMoreThanTheTwoContractsList) {
  EXPECT_TRUE(violation("worker/step_plan.h", "kernels/tensor.h"));
  EXPECT_TRUE(violation("coordinator/scheduler.h", "coordinator/engine.h"));
  EXPECT_FALSE(violation("coordinator/scheduler.h", "worker/step_plan.h"));
  EXPECT_FALSE(violation("worker/step_plan.h", "string"));
}

TEST(Layering, ReadsIncludesHoweverTheyAreWritten) {
  const std::filesystem::path path = std::filesystem::path(::testing::TempDir()) / "layering_includes.h";
  std::ofstream(path) << "#include <vector>\n  #  include \"worker/worker.h\"  // why\n// #include \"no.h\"\nint x;\n";
  EXPECT_THAT(includes_of(path), ElementsAre("vector", "worker/worker.h"));
  std::filesystem::remove(path);
}

int collect_name(dl_phdr_info* info, size_t, void* names) {
  static_cast<std::vector<std::string>*>(names)->emplace_back(info->dlpi_name);
  return 0;
}

TEST(Layering, TheCoreLoadsNeitherGrpcNorMpi) {
  std::vector<std::string> loaded;
  dl_iterate_phdr(collect_name, &loaded);
  int known = 0;
  for (const std::string& library : loaded) {
    known += library.find("libstdc++") != std::string::npos;
    for (const char* forbidden :
         {"libgrpc", "libprotobuf", "libprometheus", "libmpi", "libopen-rte", "libcuda", "libnccl"}) {
      EXPECT_EQ(library.find(forbidden), std::string::npos) << "the core links " << library;
    }
  }
  EXPECT_EQ(known, 1) << "the list of loaded libraries is not what this test takes it for";
}

}  // namespace
}  // namespace octet
