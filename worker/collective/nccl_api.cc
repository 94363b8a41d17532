#include "worker/collective/nccl_api.h"

#include <dlfcn.h>

#include <filesystem>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace octet {
namespace {

constexpr const char* kSoname = "libnccl.so.2";
constexpr const char* kOrHost = ", or sum on the host with --allreduce host";
// The first with all that NcclConfig says, and the first that is at home on the H100.
constexpr int kLeastVersion = 21800;

// 2.28.9 is 22809; the older scheme, before 2.9, is far below what is accepted.
std::string version_text(int version) {
  return absl::StrCat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

// Where to look, best first; a name without a folder is for the loader to find.
std::vector<std::string> candidates(const char* (*variable)(const char* name)) {
  if (const char* const named = variable(kNcclLibraryVariable); named != nullptr && *named != '\0') return {named};
  std::vector<std::string> paths = {kSoname};
  for (const char* const toolkit : {variable("CUDA_HOME"), variable("CUDA_PATH"), "/usr/local/cuda"}) {
    if (toolkit != nullptr && *toolkit != '\0') paths.push_back(absl::StrCat(toolkit, "/lib64/", kSoname));
  }
  return paths;
}

bool is_there(const std::string& path) {
  std::error_code error;
  return path.find('/') == std::string::npos || std::filesystem::exists(path, error);
}

}  // namespace

absl::StatusOr<NcclApi> nccl_api_of(const std::string& library, const std::function<void*(const char* name)>& find) {
  NcclApi api;
  const char* missing = nullptr;
  const auto take = [&](const char* name, auto* function) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(find(name));
    if (*function == nullptr && missing == nullptr) missing = name;
  };
  take("ncclGetVersion", &api.get_version);
  take("ncclGetUniqueId", &api.get_unique_id);
  take("ncclCommInitRankConfig", &api.comm_init_rank_config);
  take("ncclCommGetAsyncError", &api.comm_get_async_error);
  take("ncclCommAbort", &api.comm_abort);
  take("ncclGroupStart", &api.group_start);
  take("ncclGroupEnd", &api.group_end);
  take("ncclSend", &api.send);
  take("ncclRecv", &api.recv);
  take("ncclAllReduce", &api.all_reduce);
  take("ncclGetErrorString", &api.get_error_string);
  take("ncclGetLastError", &api.get_last_error);
  const std::string needed = absl::StrCat("NCCL ", version_text(kLeastVersion), " or newer is needed", kOrHost);
  if (missing != nullptr) {
    return absl::FailedPreconditionError(absl::StrCat(library, " has no ", missing, "(): ", needed));
  }
  int version = 0;
  if (api.get_version(&version) != NcclResult::kSuccess || version < kLeastVersion) {
    return absl::FailedPreconditionError(absl::StrCat(library, " is NCCL ", version_text(version), ": ", needed));
  }
  return api;
}

absl::StatusOr<NcclApi> open_nccl(const char* (*variable)(const char* name)) {
  const std::vector<std::string> paths = candidates(variable);
  for (const std::string& path : paths) {
    if (!is_there(path)) continue;
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) return nccl_api_of(path, [&](const char* name) { return dlsym(library, name); });
    // The loader may simply not know of it; a file that is there and does not load is what to speak of.
    if (path != kSoname) return absl::FailedPreconditionError(absl::StrCat("NCCL does not load: ", dlerror(), kOrHost));
  }
  return absl::NotFoundError(absl::StrCat("NCCL was not found (", absl::StrJoin(paths, ", "), "): install ", kSoname,
                                          " or name it in ", kNcclLibraryVariable, kOrHost));
}

std::string nccl_version(const NcclApi& api) {
  int version = 0;
  (void)api.get_version(&version);
  return version_text(version);
}

}  // namespace octet
