#include "worker/step_wire.h"

#include <bit>
#include <cmath>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "octet/internal/v1/worker.pb.h"

namespace octet {
namespace {

namespace wire_v1 = internal::v1;

absl::Status refused(absl::string_view field, absl::string_view expected, absl::string_view found) {
  return absl::InvalidArgumentError(absl::StrCat("plan: ", field, " must be ", expected, ", found ", found));
}

absl::Status check_index(absl::string_view field, int32_t value) {
  return value >= 0 ? absl::OkStatus() : refused(field, "0 or more", absl::StrCat(value));
}

template <typename Repeated>
absl::Status copy_indices(absl::string_view field, const Repeated& from, std::vector<int32_t>* to) {
  to->assign(from.begin(), from.end());
  for (int32_t value : *to) {
    if (value < 0) return check_index(field, value);
  }
  return absl::OkStatus();
}

// Comparisons are written so that NaN fails them.
absl::Status decode_sampling(const wire_v1::Sampling& from, SlotSampling* to) {
  if (!(from.temperature() >= 0.0f) || std::isinf(from.temperature())) {
    return refused("sampling.temperature", "finite and 0 or more", absl::StrCat(from.temperature()));
  }
  if (!(from.top_p() > 0.0f && from.top_p() <= 1.0f)) {
    return refused("sampling.top_p", "in (0, 1]", absl::StrCat(from.top_p()));
  }
  if (!(from.min_p() >= 0.0f && from.min_p() <= 1.0f)) {
    return refused("sampling.min_p", "in [0, 1]", absl::StrCat(from.min_p()));
  }
  if (absl::Status status = check_index("sampling.top_k", from.top_k()); !status.ok()) return status;
  if (absl::Status status = check_index("sampling.top_logprobs", from.top_logprobs()); !status.ok()) return status;
  *to = {.temperature = from.temperature(),
         .top_k = from.top_k(),
         .top_p = from.top_p(),
         .min_p = from.min_p(),
         .seed = from.seed(),
         .output_index = from.output_index(),
         .top_logprobs = from.top_logprobs()};
  return absl::OkStatus();
}

absl::Status decode_run(const wire_v1::Run& from, SlotTokens* to) {
  if (absl::Status status = check_index("run.slot", from.slot()); !status.ok()) return status;
  if (absl::Status status = check_index("run.position", from.position()); !status.ok()) return status;
  if (absl::Status status = copy_indices("run.tokens", from.tokens(), &to->tokens); !status.ok()) return status;
  if (from.from_last_sample() != to->tokens.empty()) {
    return refused("run.tokens", from.from_last_sample() ? "empty with from_last_sample" : "at least one token",
                   absl::StrCat(to->tokens.size(), " tokens"));
  }
  to->slot = from.slot();
  to->position = from.position();
  to->from_last_sample = from.from_last_sample();
  to->sample = from.sample();
  if (to->position > std::numeric_limits<int32_t>::max() - to->count()) {
    return refused("run.position", "such that the last position fits 31 bits",
                   absl::StrCat(to->position, " and ", to->count(), " tokens"));
  }
  return absl::OkStatus();
}

class Digest {
 public:
  // FNV-1a over 32-bit words, with a final mix so that short inputs differ in all bits.
  void add(uint32_t word) { state_ = (state_ ^ word) * 0x100000001b3ull; }
  uint64_t value() const {
    uint64_t x = state_;
    x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdull;
    x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ull;
    return x ^ (x >> 33);
  }

 private:
  uint64_t state_ = 0xcbf29ce484222325ull;
};

}  // namespace

void encode(const StepPlan& plan, wire_v1::Plan* wire) {
  wire->Clear();
  wire->set_step(plan.step);
  wire->set_stop(plan.stop);
  wire->mutable_close()->Add(plan.close.begin(), plan.close.end());
  for (const SlotOpen& open : plan.open) {
    wire_v1::Open* to = wire->add_open();
    to->set_slot(open.slot);
    wire_v1::Sampling* sampling = to->mutable_sampling();
    sampling->set_temperature(open.sampling.temperature);
    sampling->set_top_k(open.sampling.top_k);
    sampling->set_top_p(open.sampling.top_p);
    sampling->set_min_p(open.sampling.min_p);
    sampling->set_seed(open.sampling.seed);
    sampling->set_output_index(open.sampling.output_index);
    sampling->set_top_logprobs(open.sampling.top_logprobs);
  }
  for (const SlotBlock& more : plan.blocks) {
    wire->add_block_slots(more.slot);
    wire->add_blocks(more.block);
  }
  for (const SlotTokens& tokens : plan.run) {
    wire_v1::Run* to = wire->add_run();
    to->set_slot(tokens.slot);
    to->set_position(tokens.position);
    to->mutable_tokens()->Add(tokens.tokens.begin(), tokens.tokens.end());
    to->set_from_last_sample(tokens.from_last_sample);
    to->set_sample(tokens.sample);
  }
}

absl::StatusOr<StepPlan> decode(const wire_v1::Plan& wire) {
  StepPlan plan;
  plan.step = wire.step();
  plan.stop = wire.stop();
  if (absl::Status status = copy_indices("close", wire.close(), &plan.close); !status.ok()) return status;
  plan.open.resize(wire.open_size());
  for (int i = 0; i < wire.open_size(); ++i) {
    plan.open[i].slot = wire.open(i).slot();
    if (absl::Status status = check_index("open.slot", plan.open[i].slot); !status.ok()) return status;
    absl::Status status = decode_sampling(wire.open(i).sampling(), &plan.open[i].sampling);
    if (!status.ok()) return status;
  }
  if (wire.block_slots_size() != wire.blocks_size()) {
    return refused("blocks", absl::StrCat("as many as block_slots, ", wire.block_slots_size()),
                   absl::StrCat(wire.blocks_size()));
  }
  plan.blocks.resize(wire.blocks_size());
  for (int i = 0; i < wire.blocks_size(); ++i) {
    plan.blocks[i] = {.slot = wire.block_slots(i), .block = wire.blocks(i)};
    if (absl::Status status = check_index("block_slots", wire.block_slots(i)); !status.ok()) return status;
    if (absl::Status status = check_index("blocks", wire.blocks(i)); !status.ok()) return status;
  }
  plan.run.resize(wire.run_size());
  for (int i = 0; i < wire.run_size(); ++i) {
    if (absl::Status status = decode_run(wire.run(i), &plan.run[i]); !status.ok()) return status;
  }
  return plan;
}

uint64_t sampled_digest(const StepResult& result) {
  Digest digest;
  for (const SampledToken& sampled : result.sampled) {
    digest.add(static_cast<uint32_t>(sampled.slot));
    digest.add(static_cast<uint32_t>(sampled.chosen.token));
    digest.add(std::bit_cast<uint32_t>(sampled.chosen.logprob));
    digest.add(static_cast<uint32_t>(sampled.top.size()));
    for (const TokenLogprob& other : sampled.top) {
      digest.add(static_cast<uint32_t>(other.token));
      digest.add(std::bit_cast<uint32_t>(other.logprob));
    }
  }
  return digest.value();
}

}  // namespace octet
