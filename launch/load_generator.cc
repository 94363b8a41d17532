#include "launch/load_generator.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <queue>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "octet/v1/inference_service.grpc.pb.h"

namespace octet {
namespace {

using Clock = std::chrono::steady_clock;
using Reactor = grpc::ClientReadReactor<v1::GenerateResponse>;

// A server allows a connection so many streams at least, as Octet's does; more would wait in this process.
constexpr int kStreamsPerChannel = 500;
constexpr auto kTick = std::chrono::milliseconds(100);

double seconds_between(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double>(end - begin).count();
}

Clock::duration to_duration(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

std::string name_of(grpc::StatusCode code) { return absl::StatusCodeToString(static_cast<absl::StatusCode>(code)); }

void set_prompt(const std::vector<int32_t>& prompt, v1::GenerateRequest* request) {
  request->mutable_token_ids()->mutable_ids()->Add(prompt.begin(), prompt.end());
}

// One Generate call that reads as fast as it can, or not at all after its first message. gRPC calls one On... at a
// time.
class Stream final : public Reactor {
 public:
  // What its owner hears: of the first message with tokens, and of the end, after which gRPC has let go of the stream.
  struct Owner {
    virtual void on_first_message(const StreamRecord& record) = 0;
    virtual void on_end(Stream* stream) = 0;

   protected:
    ~Owner() = default;
  };

  Stream(Owner* owner, std::unique_ptr<grpc::ClientContext> context, Clock::time_point load_begin)
      : owner_(owner), context_(std::move(context)), load_begin_(load_begin) {}

  void start(v1::InferenceService::Stub* stub, const v1::GenerateRequest& request) {
    stub->async()->Generate(context_.get(), &request, this);  // has serialised the request when it returns
    StartRead(&response_);
    StartCall();
  }

  // Any thread, for as long as the owner has it.
  void cancel() { context_->TryCancel(); }
  void read_on() {
    {
      const std::lock_guard lock(mutex_);
      stalls = false;
      if (!std::exchange(held_, false)) return;
    }
    StartRead(&response_);
    RemoveHold();
  }

  // Set before start(), read after on_end().
  StreamRecord record;
  int32_t cancel_after_tokens = 0;  // 0: never
  bool stalls = false;              // does not read after its first message, until read_on()
  int channel = 0;

 private:
  void OnReadDone(bool ok) override {
    if (!ok) return;
    if (response_.has_usage()) record.cached_tokens = response_.usage().cached_tokens();
    if (response_.tokens_size() > 0) take_tokens();
    {
      const std::lock_guard lock(mutex_);
      held_ = stalls && !record.messages.empty();
      if (held_) return AddHold();  // the stream is there until read_on(), whatever the server does
    }
    StartRead(&response_);
  }

  void take_tokens() {
    record.messages.push_back({.at = now(), .tokens = response_.tokens_size()});
    if (record.messages.size() == 1) owner_->on_first_message(record);
    tokens_ += response_.tokens_size();
    if (cancel_after_tokens > 0 && tokens_ >= cancel_after_tokens && !std::exchange(record.cancel_asked, true))
      cancel();
  }

  void OnDone(const grpc::Status& status) override {
    record.end = now();
    record.status = name_of(status.error_code());
    owner_->on_end(this);
  }

  double now() const { return seconds_between(load_begin_, Clock::now()); }

  Owner* const owner_;
  const std::unique_ptr<grpc::ClientContext> context_;
  const Clock::time_point load_begin_;
  v1::GenerateResponse response_;
  int32_t tokens_ = 0;
  std::mutex mutex_;   // read_on() against OnReadDone()
  bool held_ = false;  // no read is under way
};

// Connections to one server, opened as they are needed.
class Channels {
 public:
  explicit Channels(const Connection& server) : server_(server) {}

  // Opens as many as `streams` at once need.
  absl::Status open(int streams) {
    for (int have = 0; have < streams; have += kStreamsPerChannel) {
      if (have / kStreamsPerChannel == static_cast<int>(channels_.size())) add();
    }
    for (const Channel& channel : channels_) {
      if (channel.grpc->WaitForConnected(absl::ToChronoTime(absl::Now() + absl::Seconds(10)))) continue;
      return absl::UnavailableError(absl::StrCat("the server at ", server_.address(), " accepts no more connections"));
    }
    return absl::OkStatus();
  }

  // The one with the fewest streams. The caller gives it back.
  int take() {
    const auto fewest = std::min_element(channels_.begin(), channels_.end(),
                                         [](const Channel& a, const Channel& b) { return a.streams < b.streams; });
    int index = static_cast<int>(fewest - channels_.begin());
    if (fewest == channels_.end() || fewest->streams >= kStreamsPerChannel) index = add();
    ++channels_[index].streams;
    return index;
  }
  void give_back(int index) { --channels_[index].streams; }
  v1::InferenceService::Stub* stub(int index) { return channels_[index].stub.get(); }

 private:
  struct Channel {
    std::shared_ptr<grpc::Channel> grpc;
    std::unique_ptr<v1::InferenceService::Stub> stub;
    int streams = 0;
  };

  int add() {
    std::shared_ptr<grpc::Channel> channel = server_.new_channel(grpc::ChannelArguments());
    channels_.push_back({.grpc = channel, .stub = v1::InferenceService::NewStub(channel)});
    return static_cast<int>(channels_.size()) - 1;
  }

  const Connection& server_;
  std::vector<Channel> channels_;
};

// The requests of a load in their order, each with the moment when it is due, in seconds since the load's begin.
class Arrivals {
 public:
  // make: request `index`. limit: how many there are; 0: no end.
  Arrivals(const LoadSpec& options, LoadRequest (*make)(const LoadShape&, int64_t), int64_t limit)
      : options_(options), make_(make), limit_(limit), random_(options.shape.seed ^ 0xa5a5a5a5) {
    prepare();
  }

  bool ended() const { return ended_; }
  double due() const { return due_; }  // 0 in a closed loop: as soon as another one has ended
  // REQUIRES: !ended().
  LoadRequest take() {
    LoadRequest request = std::move(next_);
    prepare();
    return request;
  }

 private:
  // Ahead of its time, so that making a long prompt delays nobody.
  void prepare() {
    ended_ = limit_ > 0 && index_ == limit_;
    if (ended_) return;
    next_ = make_(options_.shape, index_++);
    if (options_.rate.has_value()) due_ += random_.exponential(1.0 / *options_.rate);
  }

  const LoadSpec& options_;
  LoadRequest (*const make_)(const LoadShape&, int64_t);
  const int64_t limit_;
  LoadRandom random_;
  int64_t index_ = 0;
  LoadRequest next_;
  double due_ = 0;
  bool ended_ = false;
};

v1::GenerateRequest make_message(const LoadSpec& options, const LoadRequest& load, uint64_t seed) {
  v1::GenerateRequest request;
  set_prompt(load.prompt, &request);
  request.mutable_sampling()->set_temperature(options.temperature);
  request.mutable_sampling()->set_seed(seed);
  request.mutable_stopping()->set_max_tokens(load.output_tokens);
  request.mutable_stopping()->set_ignore_eos(options.ignore_eos);
  if (options.priority.has_value()) request.set_priority(*options.priority);
  if (options.logprobs.has_value()) request.set_logprobs(*options.logprobs);
  if (!options.cache_salt.empty()) request.set_cache_salt(options.cache_salt);
  return request;
}

}  // namespace

struct LoadGenerator::Impl final : Stream::Owner {
  explicit Impl(const Connection& server) : server(server), channels(server) {}

  absl::StatusOr<LoadRecord> run(const LoadSpec& options, Arrivals* arrivals, const LoadProgress& progress);
  bool start_next(const LoadSpec& options, Arrivals* arrivals);
  void cancel_all();
  void start(const LoadSpec& options, double due, Arrivals* arrivals);
  void reap();
  void cancel_early_ones();
  Clock::time_point next_wake(const LoadSpec& options, const Arrivals& arrivals) const;

  void on_first_message(const StreamRecord& stream) override {
    const std::lock_guard lock(mutex);
    first_token_seconds += stream.messages.front().at - stream.begin;
    ++first_tokens;
  }
  void on_end(Stream* stream) override {
    const std::lock_guard lock(mutex);
    ended.push_back(stream);
    wake.notify_one();
  }

  double now() const { return seconds_between(begin, Clock::now()); }

  const Connection& server;

  // ---- run()'s thread
  Channels channels;
  Clock::time_point begin;
  LoadRecord record;
  uint64_t next_id = 0;
  std::map<Stream*, std::pair<uint64_t, std::unique_ptr<Stream>>> running;
  struct EarlyCancel {
    double at = 0;
    Stream* stream = nullptr;
    uint64_t id = 0;  // streams come and go at the same address
    bool operator>(const EarlyCancel& other) const { return at > other.at; }
  };
  std::priority_queue<EarlyCancel, std::vector<EarlyCancel>, std::greater<>> early_cancels;
  std::vector<Stream*> taken;

  // ---- Any thread, under the mutex
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<Stream*> ended;
  bool cancelled = false;
  double first_token_seconds = 0;  // summed over first_tokens streams
  int64_t first_tokens = 0;
};

absl::StatusOr<LoadRecord> LoadGenerator::Impl::run(const LoadSpec& options, Arrivals* arrivals,
                                                    const LoadProgress& progress) {
  if (absl::Status status = check_shape(options.shape); !status.ok()) return status;
  if (absl::Status status = channels.open(options.concurrency); !status.ok()) return status;
  record = {};
  begin = Clock::now();
  bool told = false;  // every stream is cancelled
  while (true) {
    reap();
    const bool more =
        !told && !arrivals->ended() && (options.seconds == 0 || std::max(now(), arrivals->due()) < options.seconds);
    if (more && start_next(options, arrivals)) continue;
    if (!more && running.empty()) break;
    cancel_early_ones();
    if (progress && options.requests > 0) {
      progress(static_cast<double>(record.streams.size()), static_cast<double>(options.requests));
    } else if (progress) {
      progress(std::min(now(), options.seconds), options.seconds);
    }
    std::unique_lock lock(mutex);
    wake.wait_until(lock, next_wake(options, *arrivals), [&] { return !ended.empty() || cancelled != told; });
    if (cancelled == told) continue;
    lock.unlock();
    told = true;
    cancel_all();
  }
  if (told) return absl::CancelledError("interrupted");
  record.seconds = now();
  return std::move(record);
}

void LoadGenerator::Impl::cancel_all() {
  for (auto& [stream, owned] : running) stream->cancel();
}

// False when none is due, or as many run as may.
bool LoadGenerator::Impl::start_next(const LoadSpec& options, Arrivals* arrivals) {
  const bool may =
      options.rate.has_value() ? arrivals->due() <= now() : static_cast<int>(running.size()) < options.concurrency;
  if (may) start(options, options.rate.has_value() ? arrivals->due() : now(), arrivals);
  return may;
}

Clock::time_point LoadGenerator::Impl::next_wake(const LoadSpec& options, const Arrivals& arrivals) const {
  Clock::time_point at = Clock::now() + kTick;
  if (options.rate.has_value() && !arrivals.ended()) at = std::min(at, begin + to_duration(arrivals.due()));
  if (!early_cancels.empty()) at = std::min(at, begin + to_duration(early_cancels.top().at));
  return at;
}

void LoadGenerator::Impl::start(const LoadSpec& options, double due, Arrivals* arrivals) {
  const LoadRequest load = arrivals->take();
  const uint64_t id = next_id++;
  auto stream = std::make_unique<Stream>(this, server.make_context(), begin);
  stream->record.begin = due;
  stream->record.prompt_tokens = static_cast<int32_t>(load.prompt.size());
  stream->record.prefix_group = load.prefix_group;
  if (load.cancel.has_value() && load.cancel->tokens > 0) {
    stream->cancel_after_tokens = load.cancel->tokens;
  } else if (load.cancel.has_value()) {
    const std::lock_guard lock(mutex);
    const double usual = first_tokens == 0 ? 0.0 : first_token_seconds / static_cast<double>(first_tokens);
    early_cancels.push({.at = now() + load.cancel->first_token_share * usual, .stream = stream.get(), .id = id});
  }
  stream->channel = channels.take();
  Stream* const started = stream.get();
  running.emplace(started, std::pair(id, std::move(stream)));
  started->start(channels.stub(started->channel), make_message(options, load, options.shape.seed + id));
}

void LoadGenerator::Impl::reap() {
  {
    const std::lock_guard lock(mutex);
    std::swap(ended, taken);
  }
  for (Stream* stream : taken) {
    channels.give_back(stream->channel);
    record.streams.push_back(std::move(stream->record));
    running.erase(stream);
  }
  taken.clear();
}

void LoadGenerator::Impl::cancel_early_ones() {
  while (!early_cancels.empty() && early_cancels.top().at <= now()) {
    const EarlyCancel due = early_cancels.top();
    early_cancels.pop();
    const auto found = running.find(due.stream);
    if (found == running.end() || found->second.first != due.id) continue;
    found->first->record.cancel_asked = true;  // only tokens write it otherwise, and this stream waits for none
    found->first->cancel();
  }
}

LoadGenerator::LoadGenerator(const Connection& server) : impl_(std::make_unique<Impl>(server)) {}
LoadGenerator::~LoadGenerator() = default;

absl::Status LoadGenerator::warm_up(const LoadSpec& options, int64_t requests) {
  if (requests == 0) return absl::OkStatus();
  LoadSpec closed = options;
  closed.rate.reset();
  closed.seconds = 0;
  Arrivals arrivals(closed, make_warmup_request, requests);
  return impl_->run(closed, &arrivals, nullptr).status();
}

absl::StatusOr<LoadRecord> LoadGenerator::run(const LoadSpec& options, const LoadProgress& progress) {
  Arrivals arrivals(options, make_request, options.requests);
  return impl_->run(options, &arrivals, progress);
}

void LoadGenerator::cancel() {
  const std::lock_guard lock(impl_->mutex);
  impl_->cancelled = true;
  impl_->wake.notify_one();
}

struct StalledStreams::Impl final : Stream::Owner {
  void on_first_message(const StreamRecord&) override {
    const std::lock_guard lock(mutex);
    ++first_messages;
    changed.notify_all();
  }
  void on_end(Stream* stream) override {
    const std::lock_guard lock(mutex);
    ended.push_back(stream);
    if (stream->record.messages.empty()) ++first_messages;  // it waits for none any more
    changed.notify_all();
  }
  bool all_ended() const { return ended.size() == streams.size(); }  // REQUIRES: mutex

  std::vector<std::shared_ptr<grpc::Channel>> channels;
  std::vector<std::unique_ptr<v1::InferenceService::Stub>> stubs;
  std::vector<std::unique_ptr<Stream>> streams;

  std::mutex mutex;
  std::condition_variable changed;
  size_t first_messages = 0;
  std::vector<const Stream*> ended;
};

StalledStreams::StalledStreams(const Connection& server, const StalledOptions& options)
    : impl_(std::make_unique<Impl>()) {
  constexpr int32_t kPromptTokens = 16;
  const int32_t prompt_tokens = std::min(kPromptTokens, options.shape.max_context - 1);
  LoadRandom random(options.shape.seed ^ 0x57a11);
  const Clock::time_point begin = Clock::now();
  for (int i = 0; i < options.streams; ++i) {
    if (i % kStreamsPerChannel == 0) {
      grpc::ChannelArguments arguments;
      arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);  // which would widen the window
      arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 64 << 10);
      impl_->channels.push_back(server.new_channel(arguments));
      impl_->stubs.push_back(v1::InferenceService::NewStub(impl_->channels.back()));
    }
    v1::GenerateRequest request;
    for (int32_t t = 0; t < prompt_tokens; ++t) {
      request.mutable_token_ids()->add_ids(random.below(options.shape.vocab_size));
    }
    request.mutable_stopping()->set_max_tokens(
        std::min(options.output_tokens, options.shape.max_context - prompt_tokens));
    request.mutable_stopping()->set_ignore_eos(true);
    request.set_logprobs(20);
    request.set_cache_salt(options.cache_salt);
    auto& stream = impl_->streams.emplace_back(std::make_unique<Stream>(impl_.get(), server.make_context(), begin));
    stream->stalls = true;
    stream->record.prompt_tokens = prompt_tokens;
    stream->record.begin = seconds_between(begin, Clock::now());
    stream->start(impl_->stubs.back().get(), request);
  }
}

StalledStreams::~StalledStreams() {
  for (const auto& stream : impl_->streams) stream->cancel();
  for (const auto& stream : impl_->streams) stream->read_on();
  std::unique_lock lock(impl_->mutex);
  impl_->changed.wait(lock, [this] { return impl_->all_ended(); });
}

bool StalledStreams::wait_stalled(absl::Time deadline) {
  std::unique_lock lock(impl_->mutex);
  return impl_->changed.wait_until(lock, absl::ToChronoTime(deadline),
                                   [this] { return impl_->first_messages == impl_->streams.size(); });
}

bool StalledStreams::read_on(absl::Time deadline) {
  for (const auto& stream : impl_->streams) stream->read_on();
  std::unique_lock lock(impl_->mutex);
  return impl_->changed.wait_until(lock, absl::ToChronoTime(deadline), [this] { return impl_->all_ended(); });
}

std::vector<StreamRecord> StalledStreams::records() const {
  const std::lock_guard lock(impl_->mutex);
  std::vector<StreamRecord> records(impl_->streams.size());
  for (size_t i = 0; i < records.size(); ++i) {
    // Those that are open still belong to gRPC's threads.
    const Stream* stream = impl_->streams[i].get();
    if (std::count(impl_->ended.begin(), impl_->ended.end(), stream) > 0) records[i] = stream->record;
  }
  return records;
}

}  // namespace octet
