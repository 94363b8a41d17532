// Choices on the (emulated) device against the host's Sampler, over random requests: no bit may differ.
#include "worker/device_sampler.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "kernels/cuda/open_module.h"
#include "tests/op_cases.h"
#include "tests/surroundings.h"

namespace octet {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

const Stream::CpuOptions kHost = {.threads = 1, .isa = best_isa(), .spin = false};

class DeviceSamplerTest : public testing::Test {
 protected:
  DeviceSamplerTest()
      : module_(*cuda::open_module(cuda_module_under_test())),
        device_(*module_, 0, Arithmetic::kReproducible, kHost),
        host_(kHost) {}

  // Chooses from every row on both sides.
  void expect_same(const Tensor& logits, const std::vector<SlotSampling>& requests) {
    const int64_t rows = logits.dim(0), vocab = logits.dim(1);
    DeviceSampler there(device_, rows, vocab);
    Sampler here(host_);
    Buffer memory(logits.bytes(), device_);
    const Tensor on_device = memory.tensor(DType::kF32, logits.shape());
    copy(device_, logits, on_device);
    for (int64_t row = 0; row < rows; ++row) {
      const Choice choice = choice_from(logits, row, requests[row]);
      ASSERT_TRUE(DeviceSampler::takes(choice));
      there.set(row, choice);
    }
    there.run(on_device);
    device_.synchronize();
    for (int64_t row = 0; row < rows; ++row) {
      SampledToken expected, actual;
      const Choice choice = choice_from(logits, row, requests[row]);
      here.sample(choice, &expected);
      there.report(row, choice.row.log_sum_exp, &actual);
      ASSERT_EQ(actual, expected) << describe(requests[row]) << " vocabulary " << vocab << ": token "
                                  << actual.chosen.token << ", not " << expected.chosen.token;
    }
  }

  static Choice choice_from(const Tensor& logits, int64_t row, const SlotSampling& sampling) {
    const int64_t vocab = logits.dim(1);
    return {.row = {.logits = {logits.as<float>() + row * vocab, static_cast<size_t>(vocab)}, .log_sum_exp = 3.25f},
            .sampling = sampling,
            .position = static_cast<int32_t>(17 + row)};
  }

  static std::string describe(const SlotSampling& s) {
    return "temperature " + std::to_string(s.temperature) + " top_k " + std::to_string(s.top_k) + " top_p " +
           std::to_string(s.top_p) + " min_p " + std::to_string(s.min_p) + " top " + std::to_string(s.top_logprobs);
  }

  template <typename T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[random_.below(static_cast<int64_t>(values.size()))];
  }

  SlotSampling random_request() {
    return {.temperature = one_of({0.0f, 0.3f, 1.0f, 1.0f, 2.5f, 100.0f}),
            .top_k = one_of({0, 0, 1, 2, 40, 400, 100'000}),
            .top_p = one_of({1.0f, 1.0f, 0.999f, 0.9f, 0.5f, 0.0f}),
            .min_p = one_of({0.0f, 0.0f, 0.05f, 0.5f, 1.0f}),
            .seed = random_.bits(),
            .output_index = static_cast<uint32_t>(random_.below(3)),
            .top_logprobs = one_of({0, 0, 1, 5, 32})};
  }

  const cuda::ModuleTable* module_;
  Stream device_, host_;
  Random random_{1};
};

TEST_F(DeviceSamplerTest, ChoosesAsTheHostDoes) {
  for (const int64_t vocab : {1, 2, 63, 64, 65, 1000, 1025, 5003, 40'000}) {
    const int64_t rows = vocab > 10'000 ? 12 : 40;
    const Owned logits = random_.f32({rows, vocab}, one_of({0.5f, 3.0f, 10.0f}));
    std::vector<SlotSampling> requests;
    for (int64_t row = 0; row < rows; ++row) requests.push_back(random_request());
    expect_same(logits, requests);
    if (HasFatalFailure()) return;
  }
}

// Whole numbers, so that most logits have equals, some of them -infinity or denormal, or all the same.
TEST_F(DeviceSamplerTest, BreaksTiesAsTheHostDoes) {
  for (const int64_t vocab : {50, 1500, 3000}) {
    for (const int64_t levels : {1, 3, 30}) {
      const int64_t rows = 30;
      Owned logits(DType::kF32, {rows, vocab});
      for (int64_t i = 0; i < rows * vocab; ++i) {
        float& logit = logits.tensor.as<float>()[i];
        logit = static_cast<float>(random_.below(levels));
        const int64_t special = random_.below(40);
        if (special == 0 && i % vocab != 7) logit = -kInf;
        if (special == 1 && logit == 0.0f) logit = one_of({1e-40f, -1e-40f, -0.0f});
      }
      std::vector<SlotSampling> requests;
      for (int64_t row = 0; row < rows; ++row) requests.push_back(random_request());
      expect_same(logits, requests);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(DeviceSamplerTest, FindsFewerThanWereAskedForWhereTheOthersAreImpossible) {
  Owned logits(DType::kF32, {3, 300});
  std::fill_n(logits.tensor.as<float>(), 900, -kInf);
  for (const int64_t at : {5, 250, 310, 601, 777, 899}) logits.tensor.as<float>()[at] = static_cast<float>(at % 3);
  const SlotSampling request{.temperature = 1.0f, .top_k = 20, .seed = 3, .top_logprobs = 10};
  expect_same(logits, {request, request, {.top_logprobs = 10}});
}

TEST_F(DeviceSamplerTest, LeavesChangedLogitsToTheHost) {
  const Owned logits = random_.f32({1, 10});
  const auto takes = [&](const SlotSampling& sampling) {
    return DeviceSampler::takes(choice_from(logits, 0, sampling));
  };
  EXPECT_TRUE(takes({.temperature = 0.5f, .top_k = 3, .top_p = 0.5f, .min_p = 0.1f, .top_logprobs = 32}));
  EXPECT_FALSE(takes({.top_logprobs = 33}));
  EXPECT_FALSE(takes({.presence_penalty = 0.5f}));
  EXPECT_FALSE(takes({.logit_bias = {{.token = 1, .bias = 1.0f}}}));
  EXPECT_FALSE(takes({.allowed_token_ids = {1}}));
  EXPECT_FALSE(takes({.min_tokens = 3, .end_token_ids = {1}}));
}

}  // namespace
}  // namespace octet
