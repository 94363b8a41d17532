#include "worker/collective/device_communicator.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "worker/collective/staged_communicator.h"

namespace octet {
namespace {

// Why NCCL cannot join these ranks; empty: nothing stands against it.
std::string reason_against_nccl(std::span<const DeviceFactsOfRank> ranks) {
  for (size_t b = 1; b < ranks.size(); ++b) {
    for (size_t a = 0; a < b; ++a) {
      if (ranks[a].gpu == ranks[b].gpu) {
        return absl::StrCat("ranks ", a, " and ", b, " share ", ranks[a].gpu,
                            ", which NCCL refuses: start one rank for each GPU");
      }
    }
  }
  for (size_t r = 0; r < ranks.size(); ++r) {
    if (!ranks[r].nccl_error.empty()) return absl::StrCat("rank ", r, ": ", ranks[r].nccl_error);
    if (ranks[r].nccl_version != ranks[0].nccl_version) {
      return absl::StrCat("rank ", r, " has NCCL ", ranks[r].nccl_version, ", rank 0 ", ranks[0].nccl_version,
                          ": install the same one on every node");
    }
  }
  return "";
}

// As it travels; what does not fit is cut.
struct Wire {
  char gpu[64] = {}, nccl_version[32] = {}, nccl_error[512] = {};
};

template <size_t kBytes>
void write(const std::string& text, char (&to)[kBytes]) {
  std::memcpy(to, text.data(), std::min(text.size(), kBytes - 1));
}

std::vector<DeviceFactsOfRank> gather(Communicator& host, const DeviceFactsOfRank& mine) {
  Wire wire;
  write(mine.gpu, wire.gpu);
  write(mine.nccl_version, wire.nccl_version);
  write(mine.nccl_error, wire.nccl_error);
  std::vector<Wire> wires(host.size());
  host.all_gather(&wire, std::vector<int64_t>(host.size(), sizeof(Wire)), wires.data());
  std::vector<DeviceFactsOfRank> ranks;
  for (const Wire& w : wires) ranks.push_back({w.gpu, w.nccl_version, w.nccl_error});
  return ranks;
}

}  // namespace

const char* name_of(AllReduce kind) {
  switch (kind) {
    case AllReduce::kAuto:
      return "auto";
    case AllReduce::kNccl:
      return "nccl";
    case AllReduce::kP2p:
      return "p2p";
    case AllReduce::kHost:
      return "host";
  }
  return "?";
}

absl::StatusOr<AllReduceChoice> choose_all_reduce(AllReduce wanted, std::span<const DeviceFactsOfRank> ranks,
                                                  int nodes) {
  if (ranks.size() == 1) return AllReduceChoice{.reason = "a single rank has nobody to meet"};
  if (wanted == AllReduce::kHost) return AllReduceChoice{.reason = "asked for"};
  if (wanted == AllReduce::kP2p) {
    if (nodes == 1) return AllReduceChoice{.kind = AllReduce::kP2p, .reason = "asked for"};
    return absl::FailedPreconditionError(
        absl::StrCat("--allreduce p2p: the ranks are on ", nodes,
                     " nodes, and GPUs read one another's memory inside a node only: name nccl or host"));
  }
  const std::string against = reason_against_nccl(ranks);
  if (wanted == AllReduce::kNccl) {
    if (against.empty()) return AllReduceChoice{.kind = AllReduce::kNccl, .reason = "asked for"};
    return absl::FailedPreconditionError(absl::StrCat("--allreduce nccl: ", against));
  }
  const AllReduce library = against.empty() ? AllReduce::kNccl : AllReduce::kHost;
  const std::string why =
      against.empty() ? absl::StrCat("each rank has a GPU of its own, and NCCL ", ranks[0].nccl_version) : against;
  if (nodes > 1) return AllReduceChoice{.kind = library, .reason = why};
  return AllReduceChoice{.kind = AllReduce::kP2p, .fallback = library, .reason = why};
}

absl::StatusOr<DeviceCommunicator> make_device_communicator(Stream& stream, std::unique_ptr<Communicator> host,
                                                            const std::function<absl::StatusOr<NcclApi>()>& open,
                                                            const DeviceCommunicatorOptions& options) {
  DeviceFactsOfRank mine = {.gpu = options.gpu};
  const bool may_be_nccl = options.wanted == AllReduce::kAuto || options.wanted == AllReduce::kNccl;
  absl::StatusOr<NcclApi> nccl = absl::NotFoundError("NCCL was not looked for");
  if (may_be_nccl && host->size() > 1) nccl = open();
  if (nccl.ok()) {
    mine.nccl_version = nccl_version(*nccl);
  } else {
    mine.nccl_error = std::string(nccl.status().message());
  }
  absl::StatusOr<AllReduceChoice> choice =
      choose_all_reduce(options.wanted, gather(*host, mine), options.nccl.map.nodes());
  if (!choice.ok()) return choice.status();
  if (host->size() == 1) return DeviceCommunicator{std::move(host), *std::move(choice)};  // it sums where it computes

  std::unique_ptr<Communicator> communicator = std::move(host);
  if (choice->kind == AllReduce::kNccl || choice->fallback == AllReduce::kNccl) {
    auto made = make_nccl_communicator(*nccl, stream, std::move(communicator), options.nccl);
    if (!made.ok()) return made.status();
    communicator = *std::move(made);
  }
  if (choice->kind == AllReduce::kP2p) {
    PeerCommunicatorOptions peer = options.peer;
    peer.inner_sums_on_device = choice->fallback == AllReduce::kNccl;
    auto made = make_peer_communicator(stream, communicator, peer);
    if (made.ok()) {
      choice->reason = (*made)->report();
      return DeviceCommunicator{*std::move(made), *std::move(choice)};
    }
    if (choice->fallback == AllReduce::kP2p) return made.status();
    choice->kind = choice->fallback;
    choice->reason = std::string(made.status().message());
  }
  if (choice->kind == AllReduce::kHost) {
    communicator = std::make_unique<StagedCommunicator>(std::move(communicator), options.host);
  }
  return DeviceCommunicator{std::move(communicator), *std::move(choice)};
}

}  // namespace octet
