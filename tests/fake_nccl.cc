#include "tests/fake_nccl.h"

#include <cstring>
#include <thread>

#include "kernels/check.h"
#include "kernels/ops.h"
#include "tests/cuda_emulation/cuda_runtime.h"

namespace octet {

struct NcclComm {
  struct Receive {
    void* data;
    size_t bytes;
    NcclDataType type;
    int from;
  };
  int rank = 0, ranks = 0;
  cudaStream_t stream = nullptr;
  bool joining = true;
  std::deque<Receive> receives;  // of the group that is in progress
  void* sum = nullptr;           // of the all-reduce that is
  size_t sum_elements = 0;
  int all_reduces = 0;
  int collectives = 0;  // since the fault was ordered
  bool struck = false;  // by it
};

namespace {

FakeNccl* fake = nullptr;
thread_local NcclComm* in_group = nullptr;

constexpr NcclResult kInvalidUsage{5};

size_t size_of(NcclDataType type) {
  switch (type) {
    case NcclDataType::kUint8:
      return 1;
    case NcclDataType::kFloat32:
      return 4;
    case NcclDataType::kBFloat16:
      return 2;
  }
  return 0;
}

}  // namespace

// What the real ones do, in as few words as ours need.
struct FakeNcclCalls {
  using Kind = NcclFault::Kind;

  static NcclResult get_version(int* version) {
    *version = 22809;
    return NcclResult::kSuccess;
  }

  static NcclResult get_unique_id(NcclUniqueId* id) {
    const std::lock_guard lock(fake->mutex_);
    if (fake->fault_.kind == Kind::kNoUniqueId) return NcclResult::kSystemError;
    *id = {"the id of this job"};
    return NcclResult::kSuccess;
  }

  static NcclResult comm_init_rank_config(NcclComm** comm, int ranks, NcclUniqueId id, int rank, NcclConfig* config) {
    const std::lock_guard lock(fake->mutex_);
    OCTET_CHECK(std::string(id.bytes) == "the id of this job", "another id than rank 0's");
    OCTET_CHECK(config->blocking == 0, "calls may block");
    auto made = std::make_unique<NcclComm>();
    made->rank = rank;
    made->ranks = ranks;
    if (fake->strikes(*made, Kind::kJoinFails)) return NcclResult::kSystemError;
    if (fake->strikes(*made, Kind::kJoinNeverEnds)) made->struck = true;
    ++fake->joined_;
    *comm = made.get();
    fake->comms_.push_back(std::move(made));
    return NcclResult::kInProgress;
  }

  static NcclResult comm_get_async_error(NcclComm* comm, NcclResult* error) {
    const std::lock_guard lock(fake->mutex_);
    *error = fake->proceed(*comm);
    return NcclResult::kSuccess;
  }

  static NcclResult comm_abort(NcclComm* comm) {
    ++fake->aborting_;
    if (comm->struck && comm->stream != nullptr) comm->stream->unfinished = 0;
    ++fake->aborts_;
    while (fake->fault_.abort_hangs && !fake->released_) std::this_thread::yield();
    --fake->aborting_;
    return NcclResult::kSuccess;
  }

  static NcclResult group_start() { return NcclResult::kSuccess; }

  static NcclResult group_end() {
    const std::lock_guard lock(fake->mutex_);
    NcclComm* const comm = std::exchange(in_group, nullptr);
    return comm == nullptr ? NcclResult::kSuccess : begin(*comm);
  }

  static NcclResult send(const void* data, size_t count, NcclDataType type, int to, NcclComm* comm, void* stream) {
    const std::lock_guard lock(fake->mutex_);
    take(comm, stream);
    in_group = comm;
    FakeNccl::Message message{type, std::vector<std::byte>(count * size_of(type))};
    fake->from_device(data, message.bytes.size(), message.bytes.data());
    fake->messages_[{comm->rank, to}].push_back(std::move(message));
    return NcclResult::kSuccess;
  }

  static NcclResult recv(void* data, size_t count, NcclDataType type, int from, NcclComm* comm, void* stream) {
    const std::lock_guard lock(fake->mutex_);
    take(comm, stream);
    in_group = comm;
    comm->receives.push_back({data, count * size_of(type), type, from});
    return NcclResult::kSuccess;
  }

  static NcclResult all_reduce(const void* mine, void* sum, size_t count, NcclDataType, NcclReduction, NcclComm* comm,
                               void* stream) {
    const std::lock_guard lock(fake->mutex_);
    take(comm, stream);
    FakeNccl::AllReduce& meeting = fake->all_reduces_[comm->all_reduces++];
    meeting.of_rank.resize(comm->ranks);
    meeting.of_rank[comm->rank].resize(count);
    fake->from_device(mine, count * sizeof(float), meeting.of_rank[comm->rank].data());
    ++meeting.arrived;
    comm->sum = sum;
    comm->sum_elements = count;
    return begin(*comm);
  }

  static const char* get_error_string(NcclResult result) {
    switch (result) {
      case NcclResult::kSystemError:
        return "unhandled system error";
      case NcclResult::kRemoteError:
        return "remote process exited or there was a network error";
      default:
        return "invalid usage";
    }
  }
  static const char* get_last_error(NcclComm*) { return "\nsocket closed\nby peer\n"; }

  static void take(NcclComm* comm, void* stream) { comm->stream = static_cast<cudaStream_t>(stream); }

  static NcclResult begin(NcclComm& comm) {
    ++comm.collectives;
    if (fake->strikes(comm, Kind::kCallFails)) return kInvalidUsage;
    for (const Kind kind : {Kind::kNeverStarts, Kind::kNeverCompletes, Kind::kAsyncError}) {
      if (fake->strikes(comm, kind)) comm.struck = true;
    }
    if (comm.struck) comm.stream->unfinished = 1;
    return NcclResult::kInProgress;
  }
};

FakeNccl::FakeNccl(const cuda::ModuleTable& module)
    : stream_(module, 0, Arithmetic::kReproducible, {.threads = 1, .spin = false}) {
  OCTET_CHECK(fake == nullptr, "one NCCL at a time");
  fake = this;
}

FakeNccl::~FakeNccl() {
  released_ = true;
  while (aborting_ > 0) std::this_thread::yield();
  fake = nullptr;
}

NcclApi FakeNccl::api() const {
  return {.get_version = FakeNcclCalls::get_version,
          .get_unique_id = FakeNcclCalls::get_unique_id,
          .comm_init_rank_config = FakeNcclCalls::comm_init_rank_config,
          .comm_get_async_error = FakeNcclCalls::comm_get_async_error,
          .comm_abort = FakeNcclCalls::comm_abort,
          .group_start = FakeNcclCalls::group_start,
          .group_end = FakeNcclCalls::group_end,
          .send = FakeNcclCalls::send,
          .recv = FakeNcclCalls::recv,
          .all_reduce = FakeNcclCalls::all_reduce,
          .get_error_string = FakeNcclCalls::get_error_string,
          .get_last_error = FakeNcclCalls::get_last_error};
}

void FakeNccl::order(const NcclFault& fault) {
  const std::lock_guard lock(mutex_);
  fault_ = fault;
  for (const auto& comm : comms_) comm->collectives = 0;
}

bool FakeNccl::strikes(const NcclComm& comm, NcclFault::Kind kind) const {
  return fault_.kind == kind && fault_.rank == comm.rank && fault_.collective == comm.collectives;
}

NcclResult FakeNccl::proceed(NcclComm& comm) {
  if (comm.struck) {
    switch (fault_.kind) {
      case NcclFault::Kind::kAsyncError:
        return NcclResult::kRemoteError;
      case NcclFault::Kind::kNeverCompletes:
        return NcclResult::kSuccess;
      default:
        return NcclResult::kInProgress;
    }
  }
  if (comm.joining) {
    if (joined_ < comm.ranks) return NcclResult::kInProgress;
    comm.joining = false;
  }
  while (!comm.receives.empty()) {
    const NcclComm::Receive& receive = comm.receives.front();
    std::deque<Message>& arrived = messages_[{receive.from, comm.rank}];
    if (arrived.empty()) return NcclResult::kInProgress;
    const Message& message = arrived.front();
    if (message.type != receive.type || message.bytes.size() != receive.bytes) return kInvalidUsage;
    to_device(message.bytes.data(), receive.bytes, receive.data);
    arrived.pop_front();
    comm.receives.pop_front();
  }
  if (comm.sum == nullptr) return NcclResult::kSuccess;
  const AllReduce& meeting = all_reduces_[comm.all_reduces - 1];
  if (meeting.arrived < comm.ranks) return NcclResult::kInProgress;
  std::vector<float> sum(comm.sum_elements);
  for (const std::vector<float>& mine : meeting.of_rank) {
    if (mine.size() != sum.size()) return kInvalidUsage;
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += mine[i];
  }
  to_device(sum.data(), sum.size() * sizeof(float), std::exchange(comm.sum, nullptr));
  return NcclResult::kSuccess;
}

void FakeNccl::from_device(const void* data, size_t bytes, void* to) {
  const Shape shape{static_cast<int64_t>(bytes)};
  copy(stream_, Tensor(const_cast<void*>(data), DType::kU8, shape, Device::kCuda), Tensor(to, DType::kU8, shape));
}

void FakeNccl::to_device(const void* from, size_t bytes, void* data) {
  const Shape shape{static_cast<int64_t>(bytes)};
  copy(stream_, Tensor(const_cast<void*>(from), DType::kU8, shape), Tensor(data, DType::kU8, shape, Device::kCuda));
}

}  // namespace octet
