#include "worker/device_sampler.h"

#include <algorithm>
#include <span>

#include "kernels/cuda/module.h"
#include "kernels/ops.h"

namespace octet {
namespace {

constexpr auto kChoiceBytes = static_cast<int64_t>(sizeof(cuda::RowChoice));
constexpr auto kChosenBytes = static_cast<int64_t>(sizeof(cuda::ChosenRow));

// Three arrays side by side, each where any load of a kernel may begin.
int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

Tensor part_of(const Buffer& memory, int64_t offset, Shape shape, Device device) {
  return Tensor(static_cast<char*>(memory.data()) + offset, DType::kU8, shape, device);
}

}  // namespace

bool DeviceSampler::takes(const Choice& choice) {
  return !changes_logits(choice) && choice.sampling.top_logprobs <= cuda::kMostAlternatives;
}

int64_t DeviceSampler::bytes(int64_t max_rows, int64_t vocab_size) {
  return aligned(max_rows * kChoiceBytes) + aligned(max_rows * kChosenBytes) +
         max_rows * cuda::sample_scratch_bytes(vocab_size);
}

DeviceSampler::DeviceSampler(Stream& stream, int64_t max_rows, int64_t vocab_size)
    : stream_(stream),
      host_memory_(Buffer::page_locked(aligned(max_rows * kChoiceBytes) + aligned(max_rows * kChosenBytes), stream)),
      device_memory_(bytes(max_rows, vocab_size), stream) {
  const int64_t chosen_at = aligned(max_rows * kChoiceBytes);
  const int64_t scratch_at = chosen_at + aligned(max_rows * kChosenBytes);
  host_choices_ = part_of(host_memory_, 0, {max_rows, kChoiceBytes}, Device::kCpu);
  host_chosen_ = part_of(host_memory_, chosen_at, {max_rows, kChosenBytes}, Device::kCpu);
  device_choices_ = part_of(device_memory_, 0, {max_rows, kChoiceBytes}, Device::kCuda);
  device_chosen_ = part_of(device_memory_, chosen_at, {max_rows, kChosenBytes}, Device::kCuda);
  scratch_ = part_of(device_memory_, scratch_at, {max_rows, cuda::sample_scratch_bytes(vocab_size)}, Device::kCuda);
  clear();
}

cuda::RowChoice* DeviceSampler::choices() const { return static_cast<cuda::RowChoice*>(host_choices_.data()); }
const cuda::ChosenRow* DeviceSampler::chosen() const { return static_cast<cuda::ChosenRow*>(host_chosen_.data()); }

void DeviceSampler::clear() { std::fill_n(choices(), host_choices_.dim(0), cuda::RowChoice{}); }

void DeviceSampler::set(int64_t row, const Choice& choice) {
  const SlotSampling& sampling = choice.sampling;
  const bool greedy = sampling.temperature == 0.0f;
  choices()[row] = {.kind = greedy ? cuda::RowChoice::kGreedy : cuda::RowChoice::kDraw,
                    .alternatives = std::max(sampling.top_logprobs, 0),
                    .top_k = sampling.top_k,
                    .scale = greedy ? 1.0f : scale_of(sampling.temperature),
                    .top_p = sampling.top_p,
                    .min_p = sampling.min_p,
                    .uniform = uniform_at(sampling.seed, sampling.output_index, choice.position)};
}

void DeviceSampler::run(const Tensor& logits) {
  const int64_t rows = logits.dim(0);
  queue_copy(stream_, host_choices_.rows(0, rows), device_choices_.rows(0, rows));
  stream_.module().sample(stream_.queue(), {.logits = logits,
                                            .choices = device_choices_.rows(0, rows),
                                            .scratch = scratch_.rows(0, rows),
                                            .chosen = device_chosen_.rows(0, rows)});
  queue_copy(stream_, device_chosen_.rows(0, rows), host_chosen_.rows(0, rows));
}

void DeviceSampler::report(int64_t row, float log_sum_exp, SampledToken* out) const {
  const cuda::ChosenRow& result = chosen()[row];
  std::vector<TokenLogit> alternatives;
  for (int32_t i = 0; i < choices()[row].alternatives && result.alternatives[i].token >= 0; ++i) {
    alternatives.push_back({result.alternatives[i].token, result.alternatives[i].logit});
  }
  octet::report({result.chosen.token, result.chosen.logit}, alternatives, log_sum_exp, out);
}

}  // namespace octet
