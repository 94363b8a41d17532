// A model for tests of everything above the workers: a small byte-level tokenizer with ChatML, and a worker group that
// "samples" a script instead of computing. Deterministic: token i of every output is the script's i-th.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/served_model.h"
#include "coordinator/text/chat_format.h"
#include "coordinator/text/tokenizer.h"
#include "coordinator/worker_group.h"
#include "kernels/check.h"
#include "nlohmann/json.hpp"

namespace octet {

// The letters that byte-level vocabularies write bytes with.
inline std::string byte_letter(int byte) {
  static const std::vector<std::string> letters = [] {
    const auto utf8 = [](int code) {
      std::string text;
      if (code < 0x80) return std::string(1, static_cast<char>(code));
      text += static_cast<char>(0xC0 | (code >> 6));
      text += static_cast<char>(0x80 | (code & 0x3F));
      return text;
    };
    std::vector<std::string> result(256);
    int next = 256;
    for (int i = 0; i < 256; ++i) {
      const bool plain = (i >= '!' && i <= '~') || (i >= 0xA1 && i <= 0xAC) || (i >= 0xAE && i <= 0xFF);
      result[i] = utf8(plain ? i : next++);
    }
    return result;
  }();
  return letters[byte];
}

constexpr int32_t kFakeImStart = 1, kFakeImEnd = 2;

// Ids 0..2 are special, 3 + byte is that byte, and a few merges follow: "he", "ll", "hell", "lo".
inline Tokenizer fake_tokenizer() {
  using nlohmann::json;
  const std::vector<std::string> specials = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
  const std::vector<std::pair<std::string, std::string>> merges = {{"h", "e"}, {"l", "l"}, {"he", "ll"}, {"l", "o"}};
  json vocab, added = json::array(), merge_list = json::array();
  for (size_t i = 0; i < specials.size(); ++i) {
    vocab[specials[i]] = i;
    added.push_back({{"id", i},
                     {"content", specials[i]},
                     {"special", true},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false}});
  }
  for (int byte = 0; byte < 256; ++byte) vocab[byte_letter(byte)] = 3 + byte;
  for (const auto& [left, right] : merges) {
    vocab[left + right] = vocab.size();
    merge_list.push_back(left + " " + right);
  }
  const json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  const json file = {{"version", "1.0"},
                     {"added_tokens", added},
                     {"normalizer", nullptr},
                     {"pre_tokenizer", byte_level},
                     {"post_processor", nullptr},
                     {"decoder", byte_level},
                     {"model",
                      {{"type", "BPE"},
                       {"dropout", nullptr},
                       {"unk_token", nullptr},
                       {"continuing_subword_prefix", nullptr},
                       {"end_of_word_suffix", nullptr},
                       {"fuse_unk", false},
                       {"byte_fallback", false},
                       {"vocab", vocab},
                       {"merges", merge_list}}}};
  const json config = {
      {"eos_token", "<|im_end|>"},
      {"chat_template",
       "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
       "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"}};
  absl::StatusOr<Tokenizer> tokenizer = Tokenizer::parse(file.dump(), config.dump());
  OCTET_CHECK(tokenizer.ok(), tokenizer.status().ToString());
  return *std::move(tokenizer);
}

inline WorkerLimits fake_limits() {
  return {
      .slots = 64, .blocks = 4096, .block_tokens = 16, .max_step_tokens = 512, .max_context = 4096, .vocab_size = 263};
}

inline ServedModel fake_model(const Tokenizer& tokenizer = fake_tokenizer()) {
  absl::StatusOr<ChatFormat> chat = ChatFormat::detect(tokenizer);
  WorkerLimits limits = fake_limits();
  limits.vocab_size = tokenizer.vocab_size();
  return {.name = "fake",
          .architecture = "LlamaForCausalLM",
          .quant_method = "none",
          .parameters = 1234,
          .limits = limits,
          .tokenizer = tokenizer,
          .chat = std::move(chat),
          .generation_config = {},
          .eos_token_ids = {kFakeImEnd}};
}

class FakeWorkerGroup final : public WorkerGroup {
 public:
  explicit FakeWorkerGroup(std::vector<int32_t> script) : script_(std::move(script)) {}

  // Any thread.
  void set_step_time(std::chrono::microseconds time) { step_micros_ = time.count(); }
  void set_script(std::vector<int32_t> script) {
    const std::lock_guard lock(mutex_);
    script_ = std::move(script);
  }
  // The next collect() and all after it say so.
  void fail(const absl::Status& status) {
    const std::lock_guard lock(mutex_);
    failure_ = status;
  }

  void submit(const StepPlan& plan) override { plans_.push_back(plan); }

  absl::StatusOr<StepResult> collect() override {
    if (step_micros_ > 0) std::this_thread::sleep_for(std::chrono::microseconds(step_micros_));
    const StepPlan plan = std::move(plans_.front());
    plans_.pop_front();
    const std::lock_guard lock(mutex_);
    if (!failure_.ok()) return failure_;
    StepResult result{.step = plan.step, .sampled = {}, .error = {}};
    for (const SlotOpen& open : plan.open) slots_[open.slot] = {.outputs = 0, .top = open.sampling.top_logprobs};
    for (const SlotTokens& run : plan.run) {
      for (int32_t i = 0; i < run.scores(); ++i) {
        const int32_t follows = i + 1 < run.count() ? run.tokens[i + 1] : run.next_token;
        result.scored.push_back({.slot = run.slot, .chosen = {follows, -0.5f}, .top = {}});
        for (int32_t t = 0; t < run.score_top; ++t) result.scored.back().top.push_back({t, -1.0f - t});
      }
      if (!run.sample) continue;
      Slot& slot = slots_[run.slot];
      const size_t i = slot.outputs++;
      SampledToken sampled{
          .slot = run.slot, .chosen = {script_[i % script_.size()], -0.125f * static_cast<float>(i)}, .top = {}};
      for (int32_t t = 0; t < slot.top; ++t) sampled.top.push_back({t, -1.0f - static_cast<float>(t)});
      result.sampled.push_back(std::move(sampled));
    }
    return result;
  }

 private:
  struct Slot {
    size_t outputs = 0;
    int32_t top = 0;
  };
  std::atomic<int64_t> step_micros_{0};
  std::deque<StepPlan> plans_;  // the engine's thread
  std::map<int32_t, Slot> slots_;
  std::mutex mutex_;
  std::vector<int32_t> script_;
  absl::Status failure_;
};

}  // namespace octet
