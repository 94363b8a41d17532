// NCCL as Octet uses it: the functions of libnccl.so.2, found at run time, so that the binary starts where there is no
// NCCL and is built without its header. Where that header is found, nccl_abi_check.cc compares.
#pragma once

#include <climits>
#include <cstddef>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace octet {

struct NcclComm;  // NCCL's own

// Every other value is an error; NcclApi::get_error_string() names it.
enum class NcclResult : int { kSuccess = 0, kSystemError = 2, kRemoteError = 6, kInProgress = 7 };
enum class NcclDataType : int { kUint8 = 1, kFloat32 = 7, kBFloat16 = 9 };
enum class NcclReduction : int { kSum = 0 };

struct NcclUniqueId {
  char bytes[128];
};

// ncclConfig_t as of 2.18; newer libraries read `size` and `version`, and take their own defaults for what came later.
struct NcclConfig {
  size_t size = sizeof(NcclConfig);
  unsigned magic = 0xcafebeef;
  unsigned version = 21800;
  int blocking = 0;
  int cga_cluster_size = INT_MIN;  // NCCL_CONFIG_UNDEF_INT: NCCL's choice
  int min_ctas = INT_MIN;
  int max_ctas = INT_MIN;
  const char* net_name = nullptr;
  int split_share = INT_MIN;
  int unused = INT_MIN;  // padding here, a member of newer versions
};

// Named as in nccl.h, without the prefix. Streams are cudaStream_t.
struct NcclApi {
  NcclResult (*get_version)(int* version) = nullptr;
  NcclResult (*get_unique_id)(NcclUniqueId* id) = nullptr;
  NcclResult (*comm_init_rank_config)(NcclComm** comm, int ranks, NcclUniqueId id, int rank,
                                      NcclConfig* config) = nullptr;
  NcclResult (*comm_get_async_error)(NcclComm* comm, NcclResult* error) = nullptr;
  NcclResult (*comm_abort)(NcclComm* comm) = nullptr;
  NcclResult (*group_start)() = nullptr;
  NcclResult (*group_end)() = nullptr;
  NcclResult (*send)(const void* data, size_t count, NcclDataType type, int to, NcclComm* comm, void* stream) = nullptr;
  NcclResult (*recv)(void* data, size_t count, NcclDataType type, int from, NcclComm* comm, void* stream) = nullptr;
  NcclResult (*all_reduce)(const void* mine, void* sum, size_t count, NcclDataType type, NcclReduction reduction,
                           NcclComm* comm, void* stream) = nullptr;
  const char* (*get_error_string)(NcclResult result) = nullptr;
  const char* (*get_last_error)(NcclComm* comm) = nullptr;
};

// The variable that names the library where neither the loader nor the usual folders of the toolkit have it.
constexpr const char* kNcclLibraryVariable = "OCTET_NCCL_LIBRARY";

// libnccl.so.2: the one that the environment names, else the loader's, else a CUDA toolkit's. It stays loaded until the
// process ends. NOT_FOUND: there is none. FAILED_PRECONDITION: it does not load, lacks a function or is too old. Every
// message names the remedy. `variable` is getenv() or a test's.
absl::StatusOr<NcclApi> open_nccl(const char* (*variable)(const char* name));

// The functions that `find` finds under their names in nccl.h, `library` being where. FAILED_PRECONDITION: as above.
absl::StatusOr<NcclApi> nccl_api_of(const std::string& library, const std::function<void*(const char* name)>& find);

// "2.28.9". REQUIRES: api has been opened.
std::string nccl_version(const NcclApi& api);

}  // namespace octet
