#include "launch/capacity_report.h"

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "worker/checkpoint/inspect.h"
#include "worker/kv_cache.h"

namespace octet {
namespace {

using nlohmann::ordered_json;

constexpr int64_t kContexts[] = {2048, 8192, 32768, 131072};
constexpr int64_t kDecodeBatches[] = {1, 16, 64, 256};
constexpr int64_t kDecodeContext = 2048;

// Those of kContexts that the model can have; its own maximum when it is shorter than all of them.
std::vector<int64_t> contexts_of(const ModelConfig& config) {
  std::vector<int64_t> contexts;
  for (int64_t context : kContexts) {
    if (context <= config.max_position_embeddings) contexts.push_back(context);
  }
  if (contexts.empty()) contexts.push_back(config.max_position_embeddings);
  return contexts;
}

// Sequences of `context` tokens in a cache of `blocks`.
int64_t batch_of(int64_t blocks, int64_t context) { return blocks / ((context + kKvBlockTokens - 1) / kKvBlockTokens); }

void add_room(const Scenario& scenario, const MemoryPlan& plan, CapacityReport* report) {
  report->ranks = plan.ranks;
  report->kv_tokens = plan.kv_tokens();
  report->kv_bytes_per_token = plan.kv_block_bytes_max / kKvBlockTokens;
  report->max_context = plan.limits.max_context;
  report->max_sequences = plan.limits.slots;
  for (int64_t context : contexts_of(scenario.formats.config)) {
    report->batches.push_back({.context = context,
                               .bf16_kv = batch_of(plan.limits.blocks, context),
                               .fp8_kv = batch_of(2 * int64_t{plan.limits.blocks}, context)});
  }
}

TimeRow predicted(const Scenario& scenario, const RankSpeed& speed, const SpeedShares& shares, StepLoad load,
                  int64_t blocks) {
  const auto seconds = [&](const SpeedShares& of, int kv_bytes) {
    load.kv_bytes_per_value = kv_bytes;
    return predict_step(scenario.formats, scenario.ranks, speed, of, load).total();
  };
  TimeRow row;
  row.predicted_fp8_kv_seconds = seconds(shares, 1);
  row.predicted_seconds = seconds(shares, 2);
  row.limit_seconds = seconds({}, 2);
  row.fits = batch_of(blocks, load.context) >= load.sequences;
  row.load = load;
  return row;
}

void add_times(const Scenario& scenario, const RankSpeed& speed, const SpeedShares& shares, int64_t blocks,
               CapacityReport* report) {
  const std::vector<int64_t> contexts = contexts_of(scenario.formats.config);
  const int64_t context = std::min(kDecodeContext, contexts.back());
  for (int64_t batch : kDecodeBatches) {
    report->decode.push_back(
        predicted(scenario, speed, shares, {.sequences = batch, .new_tokens = 1, .context = context}, blocks));
  }
  for (int64_t tokens : contexts) {
    report->prefill.push_back(
        predicted(scenario, speed, shares, {.sequences = 1, .new_tokens = tokens, .context = tokens}, blocks));
  }
}

// "0-7": ranks that hold the same.
struct RankGroup {
  size_t first = 0, last = 0;
};

std::vector<RankGroup> groups_of(const std::vector<RankBytes>& ranks) {
  std::vector<RankGroup> groups;
  for (size_t r = 0; r < ranks.size(); ++r) {
    if (r > 0 && ranks[r].total() == ranks[r - 1].total() &&
        ranks[r].weights.embedding == ranks[r - 1].weights.embedding) {
      groups.back().last = r;
    } else {
      groups.push_back({r, r});
    }
  }
  return groups;
}

std::string name_of(const RankGroup& group) {
  return group.first == group.last ? absl::StrCat(group.first) : absl::StrCat(group.first, "-", group.last);
}

std::string bytes_table(const CapacityReport& report) {
  std::string text = absl::StrFormat("%-6s %11s %11s %13s %11s %11s %11s %11s %11s %11s %11s\n", "rank", "embedding",
                                     "attention", "feed forward", "lm_head", "norms", "scales",
                                     report.on_gpus ? "reserve" : "scratch", "KV cache", "total", "usable");
  for (const RankGroup& group : groups_of(report.ranks)) {
    const RankBytes& b = report.ranks[group.first];
    const auto usable = static_cast<int64_t>(report.usable_share * static_cast<double>(report.each.memory_bytes));
    absl::StrAppendFormat(&text, "%-6s %11s %11s %13s %11s %11s %11s %11s %11s %11s %11s\n", name_of(group),
                          human_bytes(b.weights.embedding), human_bytes(b.weights.attention),
                          human_bytes(b.weights.feed_forward), human_bytes(b.weights.lm_head),
                          human_bytes(b.weights.norms), human_bytes(b.weights.scales), human_bytes(b.scratch),
                          human_bytes(b.kv_cache), human_bytes(b.total()), human_bytes(usable));
  }
  return text;
}

std::string room_table(const CapacityReport& report) {
  std::string text =
      absl::StrFormat("KV cache  %s bytes a token and rank, maximum context %s\n%-10s %12s",
                      with_commas(report.kv_bytes_per_token), with_commas(report.max_context), "", "tokens");
  for (const BatchRow& row : report.batches)
    absl::StrAppendFormat(&text, " %15s", absl::StrCat("batch at ", row.context));
  absl::StrAppendFormat(&text, "\n%-10s %12s", "BF16", with_commas(report.kv_tokens));
  for (const BatchRow& row : report.batches) absl::StrAppendFormat(&text, " %15d", row.bf16_kv);
  absl::StrAppendFormat(&text, "\n%-10s %12s", "FP8", with_commas(2 * report.kv_tokens));
  for (const BatchRow& row : report.batches) absl::StrAppendFormat(&text, " %15d", row.fp8_kv);
  return text + "   (what it would be: serve keeps BF16)\n";
}

std::string decode_table(const CapacityReport& report) {
  std::string text = absl::StrFormat("%-10s %12s %12s %14s %12s %12s\n", "decode", "limit", "predicted", "with FP8 KV",
                                     "tokens/s", "of each");
  for (const TimeRow& row : report.decode) {
    const double batch = static_cast<double>(row.load.sequences);
    absl::StrAppendFormat(&text, "%-10s %9.2f ms %9.2f ms %11.2f ms %12.0f %12.1f%s\n",
                          absl::StrCat("batch ", row.load.sequences), 1e3 * row.limit_seconds,
                          1e3 * row.predicted_seconds, 1e3 * row.predicted_fp8_kv_seconds,
                          batch / row.predicted_seconds, 1 / row.predicted_seconds,
                          row.fits ? "" : "   (more than the BF16 cache holds)");
  }
  return text;
}

std::string prefill_table(const CapacityReport& report) {
  std::string text = absl::StrFormat("%-10s %12s %12s %14s %12s\n", "prefill", "limit", "predicted", "", "tokens/s");
  for (const TimeRow& row : report.prefill) {
    absl::StrAppendFormat(&text, "%-10d %10.3f s %10.3f s %14s %12.0f%s\n", row.load.new_tokens, row.limit_seconds,
                          row.predicted_seconds, "", static_cast<double>(row.load.new_tokens) / row.predicted_seconds,
                          row.fits ? "" : "   (more than the BF16 cache holds)");
  }
  return text;
}

std::string to_string(const Remedy& remedy) {
  return absl::StrJoin(remedy, " ", [](std::string* out, const Change& change) {
    absl::StrAppend(out, change.option, " ", change.value);
    if (!change.note.empty()) absl::StrAppend(out, " (", change.note, ")");
  });
}

ordered_json to_json(const RankBytes& bytes) {
  return {{"embedding", bytes.weights.embedding},
          {"attention", bytes.weights.attention},
          {"feed_forward", bytes.weights.feed_forward},
          {"lm_head", bytes.weights.lm_head},
          {"norms", bytes.weights.norms},
          {"scales", bytes.weights.scales},
          {"weights", bytes.weights.total()},
          {"scratch", bytes.scratch},
          {"kv_cache", bytes.kv_cache},
          {"total", bytes.total()}};
}

ordered_json to_json(const TimeRow& row) {
  return {{"sequences", row.load.sequences},
          {"new_tokens", row.load.new_tokens},
          {"context", row.load.context},
          {"fits", row.fits},
          {"limit_seconds", row.limit_seconds},
          {"predicted_seconds", row.predicted_seconds},
          {"predicted_fp8_kv_seconds", row.predicted_fp8_kv_seconds}};
}

}  // namespace

absl::StatusOr<CapacityReport> make_report(const Scenario& scenario, const RankSpeed& speed, const SpeedShares& shares,
                                           std::vector<std::string> assumptions) {
  CapacityReport report{.config = scenario.formats.config.to_string(),
                        .on_gpus = scenario.gpu.has_value(),
                        .each = resources_of_rank(scenario),
                        .usable_share = scenario.memory.usable_share,
                        .assumptions = std::move(assumptions)};
  const absl::StatusOr<MemoryPlan> plan = fit(scenario);
  report.fit = plan.status();
  if (plan.ok()) {
    add_room(scenario, *plan, &report);
    add_times(scenario, speed, shares, plan->limits.blocks, &report);
    return report;
  }
  if (!absl::IsResourceExhausted(plan.status())) return plan.status();
  for (int rank = 0; rank < scenario.ranks; ++rank) {
    report.ranks.push_back(
        *bytes_without_cache(scenario.formats, scenario.memory, rank, scenario.ranks, report.each.threads));
  }
  report.remedies = find_remedies(scenario);
  return report;
}

std::string to_text(const CapacityReport& report) {
  std::string text = absl::StrCat(report.model, ", ", report.recipe, ": ", report.config, "\n", report.hardware,
                                  absl::StrFormat(": %s each, of which %.0f %% are used\n\n",
                                                  human_bytes(report.each.memory_bytes), 100 * report.usable_share),
                                  bytes_table(report));
  if (report.on_gpus) {
    text += "reserve: CUDA context, NCCL, activations, workspace and CUDA graphs, not counted byte by byte\n";
  }
  if (!report.fit.ok()) {
    absl::StrAppend(&text, "\nDoes not fit: ", report.fit.message(), "\n",
                    report.remedies.empty() ? "" : "What makes it fit, any one of:\n");
    for (const Remedy& remedy : report.remedies) absl::StrAppend(&text, "  ", to_string(remedy), "\n");
    return text;
  }
  absl::StrAppend(&text, "\n", room_table(report), "\nPredicted, not measured; decoding with ",
                  with_commas(report.decode.front().load.context),
                  " tokens of context each, prefill of a prompt in one step:\n", decode_table(report),
                  prefill_table(report));
  for (const std::string& assumption : report.assumptions) absl::StrAppend(&text, "  ", assumption, "\n");
  absl::StrAppend(&text, "\nFits.\n");
  return text;
}

ordered_json to_json(const CapacityReport& report) {
  ordered_json json = {{"model", report.model},
                       {"config", report.config},
                       {"recipe", report.recipe},
                       {"hardware", report.hardware},
                       {"memory_bytes_per_rank", report.each.memory_bytes},
                       {"threads_per_rank", report.each.threads},
                       {"usable_share", report.usable_share},
                       {"fits", report.fit.ok()}};
  json["ranks"] = ordered_json::array();
  for (const RankBytes& bytes : report.ranks) json["ranks"].push_back(to_json(bytes));
  if (!report.fit.ok()) {
    json["reason"] = std::string(report.fit.message());
    json["remedies"] = ordered_json::array();
    for (const Remedy& remedy : report.remedies) {
      ordered_json changes = ordered_json::array();
      for (const Change& change : remedy) changes.push_back({{"option", change.option}, {"value", change.value}});
      json["remedies"].push_back(changes);
    }
    return json;
  }
  json["kv_bytes_per_token"] = report.kv_bytes_per_token;
  json["kv_tokens"] = {{"bf16", report.kv_tokens}, {"fp8", 2 * report.kv_tokens}};
  json["max_context"] = report.max_context;
  json["max_sequences"] = report.max_sequences;
  json["largest_batch"] = ordered_json::array();
  for (const BatchRow& row : report.batches) {
    json["largest_batch"].push_back({{"context", row.context}, {"bf16_kv", row.bf16_kv}, {"fp8_kv", row.fp8_kv}});
  }
  ordered_json decode = ordered_json::array(), prefill = ordered_json::array();
  for (const TimeRow& row : report.decode) decode.push_back(to_json(row));
  for (const TimeRow& row : report.prefill) prefill.push_back(to_json(row));
  json["predicted"] = {{"decode", decode}, {"prefill", prefill}, {"assumptions", report.assumptions}};
  return json;
}

}  // namespace octet
