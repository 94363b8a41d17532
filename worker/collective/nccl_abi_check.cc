// What nccl_api.h declares, held against nccl.h: only compiled, where that header is found.
#include <nccl.h>

#include <cstddef>
#include <type_traits>

#include "worker/collective/nccl_api.h"

namespace octet {
namespace {

// Whether two types travel alike through a C call.
template <typename Theirs, typename Ours>
constexpr bool kAlike =
    sizeof(Theirs) == sizeof(Ours) && std::is_pointer_v<Theirs> == std::is_pointer_v<Ours>&& std::is_class_v<Theirs> ==
                                          std::is_class_v<Ours>;

template <typename TheirResult, typename... Theirs, typename OurResult, typename... Ours>
constexpr bool same_call(TheirResult (*)(Theirs...), OurResult (*)(Ours...)) {
  if constexpr (sizeof...(Theirs) == sizeof...(Ours)) {
    return kAlike<TheirResult, OurResult> && (kAlike<Theirs, Ours> && ...);
  }
  return false;
}

constexpr NcclApi kOurs;
static_assert(same_call(decltype (&ncclGetVersion)(nullptr), kOurs.get_version));
static_assert(same_call(decltype (&ncclGetUniqueId)(nullptr), kOurs.get_unique_id));
static_assert(same_call(decltype (&ncclCommInitRankConfig)(nullptr), kOurs.comm_init_rank_config));
static_assert(same_call(decltype (&ncclCommGetAsyncError)(nullptr), kOurs.comm_get_async_error));
static_assert(same_call(decltype (&ncclCommAbort)(nullptr), kOurs.comm_abort));
static_assert(same_call(decltype (&ncclGroupStart)(nullptr), kOurs.group_start));
static_assert(same_call(decltype (&ncclGroupEnd)(nullptr), kOurs.group_end));
static_assert(same_call(decltype (&ncclSend)(nullptr), kOurs.send));
static_assert(same_call(decltype (&ncclRecv)(nullptr), kOurs.recv));
static_assert(same_call(decltype (&ncclAllReduce)(nullptr), kOurs.all_reduce));
static_assert(same_call(decltype (&ncclGetErrorString)(nullptr), kOurs.get_error_string));
static_assert(same_call(decltype (&ncclGetLastError)(nullptr), kOurs.get_last_error));

constexpr bool equal(int theirs, auto ours) { return theirs == static_cast<int>(ours); }
static_assert(equal(ncclSuccess, NcclResult::kSuccess) && equal(ncclSystemError, NcclResult::kSystemError));
static_assert(equal(ncclRemoteError, NcclResult::kRemoteError) && equal(ncclInProgress, NcclResult::kInProgress));
static_assert(equal(ncclUint8, NcclDataType::kUint8));
static_assert(equal(ncclFloat32, NcclDataType::kFloat32) && equal(ncclBfloat16, NcclDataType::kBFloat16));
static_assert(equal(ncclSum, NcclReduction::kSum));

static_assert(sizeof(ncclUniqueId) == sizeof(NcclUniqueId));
static_assert(NCCL_CONFIG_UNDEF_INT == INT_MIN);
static_assert(sizeof(NcclConfig) <= sizeof(ncclConfig_t));
static_assert(offsetof(NcclConfig, size) == offsetof(ncclConfig_t, size));
static_assert(offsetof(NcclConfig, magic) == offsetof(ncclConfig_t, magic));
static_assert(offsetof(NcclConfig, version) == offsetof(ncclConfig_t, version));
static_assert(offsetof(NcclConfig, blocking) == offsetof(ncclConfig_t, blocking));
static_assert(offsetof(NcclConfig, cga_cluster_size) == offsetof(ncclConfig_t, cgaClusterSize));
static_assert(offsetof(NcclConfig, min_ctas) == offsetof(ncclConfig_t, minCTAs));
static_assert(offsetof(NcclConfig, max_ctas) == offsetof(ncclConfig_t, maxCTAs));
static_assert(offsetof(NcclConfig, net_name) == offsetof(ncclConfig_t, netName));
static_assert(offsetof(NcclConfig, split_share) == offsetof(ncclConfig_t, splitShare));

}  // namespace
}  // namespace octet
