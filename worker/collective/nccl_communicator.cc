#include "worker/collective/nccl_communicator.h"

#include <algorithm>
#include <cstdlib>
#include <future>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "kernels/cuda/module.h"
#include "kernels/ops.h"
#include "kernels/slice_tree.h"

namespace octet {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// Shares begin at multiples of this many elements: 128 bytes in BF16, whole cache lines and vectors of both types.
constexpr int64_t kGrain = 64;
// Up to so many elements every rank gets all pieces and finishes the whole sum: a second round of messages would cost
// more than the bytes that it saves.
constexpr int64_t kOneShotElements = int64_t{1} << 16;
// What NCCL is asked every time before it is left alone for a while: starting work takes it microseconds.
constexpr milliseconds kPolling{1};

constexpr const char* kRemedy =
    "another rank or its GPU is gone or stuck, or the link between them: octet doctor --last names it, NCCL_DEBUG=INFO "
    "tells more, --allreduce host does without NCCL";
constexpr const char* kJoinRemedy =
    "NCCL_DEBUG=INFO tells more, NCCL_SOCKET_IFNAME names the network between nodes, --allreduce host does without "
    "NCCL";

constexpr int64_t align_down(int64_t value, int64_t to) { return value / to * to; }
constexpr int64_t align_up(int64_t value, int64_t to) { return align_down(value + to - 1, to); }

std::string seconds_text(milliseconds time) {
  return absl::StrFormat("%.3g s", static_cast<double>(time.count()) / 1e3);
}

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(const NcclApi& api, Stream& stream, std::unique_ptr<Communicator> host, const NcclOptions& options);
  ~NcclCommunicator() override;

  absl::Status join();
  absl::Status warm_up();
  void watch() {
    stream_.watch([this](milliseconds waited) { look(waited); });
  }

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  void all_gather(const void* mine, std::span<const int64_t> bytes_of_rank, void* all) override {
    host_->all_gather(mine, bytes_of_rank, all);
  }
  void gather(Stream& stream, const Tensor& mine, std::span<const int64_t> bytes_of_rank, const Tensor& all) override;
  void reduce_over_slices(Stream& stream, const Tensor& partials, const Tensor& residual) override;
  bool on_device() const override { return true; }
  void barrier() override { host_->barrier(); }

 private:
  // A run of the elements of a message; rows and columns play no part.
  struct Part {
    int64_t begin = 0;
    int64_t end = 0;
    int64_t size() const { return end - begin; }
  };
  struct Sum {
    const float* partials;  // [pieces of this rank, elements]
    uint16_t* residual;     // [elements]
    int64_t elements;
    bool divided;  // each rank finishes a share of a chunk and gets the others', or each finishes all of it
  };

  // Messages that travel together. Those between two ranks meet in the order in which both name them; empty ones are
  // named by neither.
  class Group {
   public:
    explicit Group(const NcclCommunicator& ranks) : ranks_(ranks), result_(ranks.api_.group_start()) {}
    void send(const void* data, int64_t count, NcclDataType type, int to) {
      if (count == 0 || result_ != NcclResult::kSuccess) return;
      result_ = ranks_.api_.send(data, static_cast<size_t>(count), type, to, ranks_.comm_, ranks_.native_stream_);
    }
    void receive(void* data, int64_t count, NcclDataType type, int from) {
      if (count == 0 || result_ != NcclResult::kSuccess) return;
      result_ = ranks_.api_.recv(data, static_cast<size_t>(count), type, from, ranks_.comm_, ranks_.native_stream_);
    }
    // Puts them on the stream.
    absl::Status end() const {
      if (result_ != NcclResult::kSuccess) return ranks_.error_of(result_, "ncclSend or ncclRecv");
      return ranks_.settle(ranks_.api_.group_end(), "ncclGroupEnd");
    }

   private:
    const NcclCommunicator& ranks_;
    NcclResult result_;
  };

  void begin_collective(const char* what, int64_t bytes) {
    ++collectives_;
    collective_ = what;
    collective_bytes_ = bytes;
  }
  std::vector<SliceNode> lay_out_pieces();
  absl::Status gather_bytes(const Tensor& mine, std::span<const int64_t> bytes_of_rank, const Tensor& all);
  absl::Status sum(const Tensor& partials, const Tensor& residual);
  absl::Status sum_fast(const Tensor& partials, const Tensor& residual);
  absl::Status sum_tree(const Sum& sum);
  Part share_of(const Sum& sum, const Part& chunk, int rank) const;
  absl::Status travel(const Sum& sum, const Part& chunk, const Part& before);
  void finish(const Sum& sum, const Part& chunk);

  float* slot_of(int rank) const { return scratch_.as<float>() + first_slot_[rank] * slot_elements_; }

  milliseconds deadline() const { return joined_ ? options_.wait_deadline : options_.join_deadline; }
  NcclResult state() const;
  absl::Status settle(NcclResult result, const char* call) const;
  absl::Status wait_for_stream() const;
  absl::Status error_of(NcclResult result, const char* call) const;
  absl::Status late(const std::string& what) const;
  std::string sentence(const std::string& cause) const;
  std::string told_by_nccl(NcclResult result) const;
  void look(milliseconds waited);
  bool abort();
  [[noreturn]] void fail(const absl::Status& cause);

  const NcclApi api_;
  Stream& stream_;
  const std::unique_ptr<Communicator> host_;
  const NcclOptions options_;
  void* const native_stream_;
  NcclComm* comm_ = nullptr;

  std::vector<int> pieces_of_rank_;  // maximal subtrees of each rank
  std::vector<int> first_slot_;      // of each other rank's pieces in scratch
  std::vector<int> program_;         // over all ranks' pieces
  Buffer scratch_memory_;
  Tensor scratch_;  // [slots, slot_elements_] F32
  int64_t slot_elements_ = 0, one_shot_elements_ = 0;
  std::vector<Tensor> pieces_;  // of the part that is being finished

  bool joined_ = false;
  uint64_t collectives_ = 0;            // asked for so far
  const char* collective_ = "nothing";  // the last one,
  int64_t collective_bytes_ = 0;        // and its result's
};

NcclCommunicator::NcclCommunicator(const NcclApi& api, Stream& stream, std::unique_ptr<Communicator> host,
                                   const NcclOptions& options)
    : api_(api),
      stream_(stream),
      host_(std::move(host)),
      options_(options),
      native_stream_(stream.module().native_stream(stream.queue())) {
  const std::vector<SliceNode> nodes = lay_out_pieces();
  const int total = options_.map.runs[0].total;
  program_ = sum_program(nodes, root_of(total), total);
  pieces_.resize(nodes.size());
  OCTET_CHECK(stream.arithmetic() == Arithmetic::kReproducible || std::ssize(nodes) == size(),
              "in the fast order a rank's result is one leaf");
  // As many as the rank with the most needs: all cut a message alike.
  const int64_t slots = std::ssize(nodes) - *std::min_element(pieces_of_rank_.begin(), pieces_of_rank_.end());
  slot_elements_ = align_down(options_.scratch_bytes / (slots * size_of(DType::kF32)), kGrain);
  one_shot_elements_ = std::min(kOneShotElements, slot_elements_);
  OCTET_CHECK(slot_elements_ > 0, "the scratch memory is too small for one cache line of every piece");
  scratch_memory_ = Buffer(slots * slot_elements_ * size_of(DType::kF32), stream);
  scratch_ = scratch_memory_.tensor(DType::kF32, {slots, slot_elements_});
}

// All ranks' pieces, and where the others' go.
std::vector<SliceNode> NcclCommunicator::lay_out_pieces() {
  std::vector<SliceNode> nodes;
  int slots = 0;
  for (int r = 0; r < size(); ++r) {
    const std::vector<SliceNode> trees = maximal_subtrees(options_.map.runs[r]);
    nodes.insert(nodes.end(), trees.begin(), trees.end());
    pieces_of_rank_.push_back(static_cast<int>(trees.size()));
    first_slot_.push_back(slots);
    if (r != rank()) slots += pieces_of_rank_[r];
  }
  return nodes;
}

NcclCommunicator::~NcclCommunicator() {
  stream_.watch(nullptr);
  abort();  // what ncclCommDestroy() does, without waiting for the other ranks
}

// ---- The start

absl::Status NcclCommunicator::join() {
  struct Invitation {
    NcclUniqueId id = {};
    NcclResult result = NcclResult::kSuccess;
  } mine, invitation;
  if (rank() == 0) mine.result = api_.get_unique_id(&mine.id);
  std::vector<int64_t> bytes_of_rank(size(), 0);
  bytes_of_rank[0] = sizeof(Invitation);
  host_->all_gather(&mine, bytes_of_rank, &invitation);
  if (invitation.result != NcclResult::kSuccess) return error_of(invitation.result, "ncclGetUniqueId");
  NcclConfig config;
  const NcclResult result = api_.comm_init_rank_config(&comm_, size(), invitation.id, rank(), &config);
  return settle(result, "ncclCommInitRankConfig");
}

// NCCL connects ranks, and CUDA loads kernels, at their first use, which allocates and waits: let it be now. A sum that
// all ranks finish whole, and one that they divide.
absl::Status NcclCommunicator::warm_up() {
  for (const int64_t elements : {kGrain, 2 * one_shot_elements_}) {
    const int64_t pieces = pieces_of_rank_[rank()];
    const Buffer partials(pieces * elements * size_of(DType::kF32), stream_);
    const Buffer residual(elements * size_of(DType::kBF16), stream_);
    if (absl::Status status =
            sum(partials.tensor(DType::kF32, {pieces, 1, elements}), residual.tensor(DType::kBF16, {1, elements}));
        !status.ok())
      return status;
    if (absl::Status status = wait_for_stream(); !status.ok()) return status;
  }
  joined_ = true;
  return absl::OkStatus();
}

// ---- Gathering

void NcclCommunicator::gather(Stream& stream, const Tensor& mine, std::span<const int64_t> bytes_of_rank,
                              const Tensor& all) {
  OCTET_CHECK(&stream == &stream_, "ranks meet on the stream that the communicator was made for");
  begin_collective("gathering", all.bytes());
  if (const absl::Status status = gather_bytes(mine, bytes_of_rank, all); !status.ok()) fail(status);
}

absl::Status NcclCommunicator::gather_bytes(const Tensor& mine, std::span<const int64_t> bytes_of_rank,
                                            const Tensor& all) {
  const int64_t my_bytes = bytes_of_rank[rank()];
  Group group(*this);
  Tensor my_place;
  char* next = static_cast<char*>(all.data());
  for (int r = 0; r < size(); next += bytes_of_rank[r], ++r) {
    if (r == rank()) {
      my_place = Tensor(next, DType::kU8, {my_bytes}, Device::kCuda);
      continue;
    }
    group.send(mine.data(), my_bytes, NcclDataType::kUint8, r);
    group.receive(next, bytes_of_rank[r], NcclDataType::kUint8, r);
  }
  if (my_bytes > 0) copy(stream_, Tensor(mine.data(), DType::kU8, my_place.shape(), Device::kCuda), my_place);
  return group.end();
}

// ---- Sums

void NcclCommunicator::reduce_over_slices(Stream& stream, const Tensor& partials, const Tensor& residual) {
  OCTET_CHECK(&stream == &stream_, "ranks meet on the stream that the communicator was made for");
  begin_collective("sum over slices", residual.bytes());
  if (const absl::Status status = sum(partials, residual); !status.ok()) fail(status);
}

absl::Status NcclCommunicator::sum(const Tensor& partials, const Tensor& residual) {
  OCTET_CHECK(partials.shape().rank() == 3 && partials.dim(0) == pieces_of_rank_[rank()] &&
                  partials.dim(1) * partials.dim(2) == residual.elements(),
              "partials " + partials.shape().to_string() + " do not fit residual " + residual.shape().to_string());
  if (residual.elements() == 0) return absl::OkStatus();
  if (stream_.arithmetic() == Arithmetic::kFast) return sum_fast(partials, residual);
  return sum_tree({.partials = partials.as<float>(),
                   .residual = residual.as<uint16_t>(),
                   .elements = residual.elements(),
                   .divided = residual.elements() > one_shot_elements_});
}

absl::Status NcclCommunicator::sum_fast(const Tensor& partials, const Tensor& residual) {
  const NcclResult result = api_.all_reduce(partials.data(), partials.data(), static_cast<size_t>(residual.elements()),
                                            NcclDataType::kFloat32, NcclReduction::kSum, comm_, native_stream_);
  if (absl::Status status = settle(result, "ncclAllReduce"); !status.ok()) return status;
  const Tensor total(partials.data(), DType::kF32, residual.shape(), Device::kCuda);
  constexpr int kWhole[] = {0};
  add_tree_sum(stream_, {&total, 1}, kWhole, residual);
  return absl::OkStatus();
}

// Chunk by chunk, as many elements as the scratch memory takes. The results of a chunk travel together with the pieces
// of the next one, so that dividing the work costs one round of messages in all, not one for every chunk. Everything is
// in the order of the stream: a slot is not filled again before it has been read.
absl::Status NcclCommunicator::sum_tree(const Sum& sum) {
  const int64_t chunk_elements = sum.divided ? slot_elements_ * size() : sum.elements;
  Part before;
  for (int64_t begin = 0; begin < sum.elements || before.size() > 0;) {
    const Part chunk{begin, std::min(begin + chunk_elements, sum.elements)};
    if (absl::Status status = travel(sum, chunk, before); !status.ok()) return status;
    finish(sum, chunk);
    before = sum.divided ? chunk : Part{};
    begin = chunk.end;
  }
  return absl::OkStatus();
}

// What `rank` finishes of a chunk: at most a slot's elements.
NcclCommunicator::Part NcclCommunicator::share_of(const Sum& sum, const Part& chunk, int rank) const {
  if (!sum.divided) return chunk;
  const int64_t each = align_up((chunk.size() + size() - 1) / size(), kGrain);
  return {chunk.begin + std::min(rank * each, chunk.size()), chunk.begin + std::min((rank + 1) * each, chunk.size())};
}

// The pieces of `chunk` to who finishes them, the results of `before` to everybody.
absl::Status NcclCommunicator::travel(const Sum& sum, const Part& chunk, const Part& before) {
  const Part mine = share_of(sum, chunk, rank()), finished = share_of(sum, before, rank());
  Group group(*this);
  for (int i = 1; i < size(); ++i) {
    const int peer = (rank() + i) % size();
    const Part theirs = share_of(sum, chunk, peer), awaited = share_of(sum, before, peer);
    for (int piece = 0; piece < pieces_of_rank_[rank()]; ++piece) {
      group.send(sum.partials + piece * sum.elements + theirs.begin, theirs.size(), NcclDataType::kFloat32, peer);
    }
    for (int piece = 0; piece < pieces_of_rank_[peer]; ++piece) {
      group.receive(slot_of(peer) + piece * slot_elements_, mine.size(), NcclDataType::kFloat32, peer);
    }
    group.send(sum.residual + finished.begin, finished.size(), NcclDataType::kBFloat16, peer);
    group.receive(sum.residual + awaited.begin, awaited.size(), NcclDataType::kBFloat16, peer);
  }
  return group.end();
}

void NcclCommunicator::finish(const Sum& sum, const Part& chunk) {
  const Part part = share_of(sum, chunk, rank());
  if (part.size() == 0) return;
  auto next = pieces_.begin();
  for (int r = 0; r < size(); ++r) {
    const bool own = r == rank();
    // The ops read their pieces; a Tensor has no const form.
    float* const first = own ? const_cast<float*>(sum.partials) + part.begin : slot_of(r);
    const int64_t stride = own ? sum.elements : slot_elements_;
    for (int piece = 0; piece < pieces_of_rank_[r]; ++piece) {
      *next++ = Tensor(first + piece * stride, DType::kF32, {1, part.size()}, Device::kCuda);
    }
  }
  add_tree_sum(stream_, pieces_, program_,
               Tensor(sum.residual + part.begin, DType::kBF16, {1, part.size()}, Device::kCuda));
}

// ---- Waiting and failing

// What NCCL has to say of the communicator: an error of its threads, too.
NcclResult NcclCommunicator::state() const {
  NcclResult state = NcclResult::kSuccess;
  const NcclResult asked = api_.comm_get_async_error(comm_, &state);
  return asked == NcclResult::kSuccess ? state : asked;
}

// Until what a non-blocking call began is under way: NCCL puts it on the stream from a thread of its own, and what the
// stream is asked for next must come behind it.
absl::Status NcclCommunicator::settle(NcclResult result, const char* call) const {
  const Clock::time_point begin = Clock::now();
  while (result == NcclResult::kInProgress) {
    result = state();
    const Clock::duration waited = Clock::now() - begin;
    if (result != NcclResult::kInProgress) break;
    if (waited > deadline()) return late(absl::StrCat(call, " is still in progress"));
    if (waited < kPolling) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kPolling);
    }
  }
  return result == NcclResult::kSuccess ? absl::OkStatus() : error_of(result, call);
}

absl::Status NcclCommunicator::wait_for_stream() const {
  const Clock::time_point begin = Clock::now();
  while (!stream_.is_done()) {
    if (const NcclResult error = state(); error != NcclResult::kSuccess) return error_of(error, "NCCL");
    if (Clock::now() - begin > deadline()) return late("the GPU is not done");
    std::this_thread::sleep_for(kPolling);
  }
  return absl::OkStatus();
}

// From within a wait for the stream.
void NcclCommunicator::look(milliseconds waited) {
  if (const NcclResult error = state(); error != NcclResult::kSuccess) fail(error_of(error, "NCCL"));
  if (waited > deadline()) fail(late("the GPU is not done"));
}

absl::Status NcclCommunicator::error_of(NcclResult result, const char* call) const {
  const std::string cause = absl::StrCat(call, ": ", told_by_nccl(result));
  // Only a rank that is gone is somebody else's failure.
  return result == NcclResult::kRemoteError ? absl::UnavailableError(sentence(cause))
                                            : absl::InternalError(sentence(cause));
}

absl::Status NcclCommunicator::late(const std::string& what) const {
  return absl::DeadlineExceededError(sentence(absl::StrCat(what, " after ", seconds_text(deadline()))));
}

std::string NcclCommunicator::sentence(const std::string& cause) const {
  if (!joined_) {
    return absl::StrFormat("the %d ranks cannot be joined through NCCL %s: %s: %s", size(), nccl_version(api_), cause,
                           kJoinRemedy);
  }
  const std::string place = options_.place ? absl::StrCat(options_.place(), ": ") : "";
  // Of a recorded step only the step is known: its collectives were asked for when it was recorded.
  return absl::StrFormat("%s%s; last collective asked for, graphs aside: %d, %s of %d bytes: %s", place, cause,
                         collectives_, collective_, collective_bytes_, kRemedy);
}

// "unhandled system error (socket closed by peer)", on one line.
std::string NcclCommunicator::told_by_nccl(NcclResult result) const {
  const char* const last = comm_ == nullptr ? nullptr : api_.get_last_error(comm_);
  const std::string detail =
      absl::StrReplaceAll(absl::StripAsciiWhitespace(last == nullptr ? "" : last), {{"\n", " "}});
  return absl::StrCat(api_.get_error_string(result), detail.empty() ? "" : absl::StrCat(" (", detail, ")"));
}

// Whether the communicator is gone. An abort may hang as well: then its thread is left behind.
bool NcclCommunicator::abort() {
  if (comm_ == nullptr) return true;
  std::packaged_task<NcclResult()> task([abort = api_.comm_abort, comm = std::exchange(comm_, nullptr)] {  //
    return abort(comm);
  });
  const std::future<NcclResult> done = task.get_future();
  std::thread(std::move(task)).detach();
  return done.wait_for(options_.abort_deadline) == std::future_status::ready;
}

void NcclCommunicator::fail(const absl::Status& cause) {
  options_.record(cause);
  std::string words(cause.message());
  if (!abort()) {
    absl::StrAppend(&words, "; ncclCommAbort has not come back after ", seconds_text(options_.abort_deadline));
  }
  options_.end(absl::Status(cause.code(), words));
  std::abort();  // end() does not return
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> make_nccl_communicator(const NcclApi& api, Stream& stream,
                                                                     std::unique_ptr<Communicator> host,
                                                                     const NcclOptions& options) {
  OCTET_CHECK(stream.device() == Device::kCuda && host->size() > 1, "NCCL is for several ranks with a GPU each");
  auto communicator = std::make_unique<NcclCommunicator>(api, stream, std::move(host), options);
  if (absl::Status status = communicator->join(); !status.ok()) return status;
  if (absl::Status status = communicator->warm_up(); !status.ok()) return status;
  communicator->watch();
  return communicator;
}

}  // namespace octet
