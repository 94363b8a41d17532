#include "launch/capacity.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace octet {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

struct NamedRecipe {
  const char* name;
  Fp8Recipe recipe;
};
constexpr NamedRecipe kRecipes[] = {
    {"bf16", Fp8Recipe::kNone}, {"fbgemm", Fp8Recipe::kFfn}, {"all-linear", Fp8Recipe::kAll}};

// One way to change one option.
struct Alternative {
  std::string value, note;
  std::function<void(Scenario*)> apply;
};

// An option and the values that it could have instead, the least costly first.
struct Lever {
  std::string option;
  std::vector<Alternative> alternatives;
};

int64_t total_weights(const Scenario& scenario) {
  const auto bytes = bytes_without_cache(scenario.formats, scenario.memory, 0, 1, 1);
  return bytes.ok() ? bytes->weights.total() : 0;
}

Lever recipe_lever(const Scenario& scenario) {
  Lever lever{.option = "--recipe"};
  for (const NamedRecipe& named : kRecipes) {
    Scenario changed = scenario;
    changed.formats = weight_formats(scenario.formats.config, named.recipe);
    if (total_weights(changed) >= total_weights(scenario)) continue;
    lever.alternatives.push_back(
        {named.name, "", [formats = changed.formats](Scenario* scenario) { scenario->formats = formats; }});
  }
  return lever;
}

// More of the same. Up to one rank for each KV head.
Lever ranks_lever(const Scenario& scenario) {
  Lever lever{.option = scenario.gpu ? "--gpus" : "--ranks"};
  for (int ranks = scenario.ranks + 1; ranks <= scenario.formats.config.num_key_value_heads; ++ranks) {
    lever.alternatives.push_back({scenario.gpu ? absl::StrCat(ranks, "x", scenario.gpu->name) : absl::StrCat(ranks),
                                  absl::StrCat(ranks - scenario.ranks, " more"),
                                  [ranks](Scenario* scenario) { scenario->ranks = ranks; }});
  }
  return lever;
}

// As many as now or up to one for each KV head, of a larger kind.
Lever gpu_lever(const Scenario& scenario) {
  Lever lever{.option = "--gpus"};
  if (!scenario.gpu || scenario.gpu->name.empty()) return lever;
  for (int ranks = scenario.ranks; ranks <= scenario.formats.config.num_key_value_heads; ++ranks) {
    for (const GpuSpec& gpu : known_gpus()) {
      if (gpu.memory_bytes <= scenario.gpu->memory_bytes) continue;
      lever.alternatives.push_back({absl::StrCat(ranks, "x", gpu.name), "", [ranks, gpu](Scenario* scenario) {
                                      scenario->ranks = ranks;
                                      scenario->gpu = gpu;
                                    }});
    }
  }
  return lever;
}

// The last value for which `holds`. REQUIRES: it holds for low, not for high, and changes once between them.
int64_t last_true(int64_t low, int64_t high, const std::function<bool(int64_t)>& holds) {
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (holds(middle) ? low : high) = middle;
  }
  return low;
}

// The largest value below `now` that fits, if there is one of at least `least`.
Lever shrinking_lever(const Scenario& scenario, const std::string& option, int64_t least, int64_t now,
                      const std::function<void(Scenario*, int64_t)>& set) {
  const auto fits = [&](int64_t value) {
    Scenario changed = scenario;
    set(&changed, value);
    return fit(changed).ok();
  };
  Lever lever{.option = option};
  if (now <= least || !fits(least)) return lever;
  const int64_t value = last_true(least, now, fits);
  lever.alternatives.push_back({absl::StrCat(value), "", [set, value](Scenario* scenario) { set(scenario, value); }});
  return lever;
}

Lever context_lever(const Scenario& scenario) {
  const auto set = [](Scenario* changed, int64_t tokens) { changed->memory.max_context = tokens; };
  return shrinking_lever(scenario, "--max-context", 2, scenario.memory.max_context.value_or(0), set);
}

Lever kv_memory_lever(const Scenario& scenario) {
  const auto set = [](Scenario* changed, int64_t mib) { changed->memory.kv_memory_bytes = mib * kMiB; };
  Lever lever = shrinking_lever(scenario, "--kv-memory", 1, scenario.memory.kv_memory_bytes.value_or(0) / kMiB, set);
  for (Alternative& alternative : lever.alternatives) alternative.value += "MiB";
  // Too little for a whole context: all that is left may be enough.
  if (lever.alternatives.empty() && scenario.memory.kv_memory_bytes && scenario.memory.max_context) {
    for (int64_t mib = 1; mib <= int64_t{1} << 30 && lever.alternatives.empty(); mib *= 2) {
      Scenario changed = scenario;
      set(&changed, mib);
      if (fit(changed).ok()) {
        lever.alternatives.push_back({absl::StrCat(mib, "MiB"), "", [set, mib](Scenario* s) { set(s, mib); }});
      }
    }
  }
  return lever;
}

// The least memory of each rank, in whole MiB, where that is a number of the user's: on CPUs and unnamed GPUs.
Lever memory_lever(const Scenario& scenario) {
  Lever lever{.option = scenario.gpu ? "--gpu-memory" : "--memory"};
  if (scenario.gpu && !scenario.gpu->name.empty()) return lever;
  const auto set = [](Scenario* changed, int64_t mib) {
    (changed->gpu ? changed->gpu->memory_bytes : changed->memory_bytes.emplace()) = mib * kMiB;
  };
  const auto too_little = [&](int64_t mib) {
    Scenario changed = scenario;
    set(&changed, mib);
    return !fit(changed).ok();
  };
  const int64_t most = int64_t{1} << 30;  // a PiB
  if (too_little(most)) return lever;
  const int64_t mib = last_true(0, most, too_little) + 1;
  lever.alternatives.push_back({absl::StrCat(mib, "MiB"), "", [set, mib](Scenario* scenario) { set(scenario, mib); }});
  return lever;
}

// Appends the first remedy that pulls levers[chosen...], each once.
void try_together(const Scenario& scenario, const std::vector<Lever>& levers, const std::vector<size_t>& chosen,
                  std::vector<Remedy>* remedies) {
  const std::function<bool(const Scenario&, size_t, Remedy*)> pull = [&](const Scenario& so_far, size_t depth,
                                                                         Remedy* remedy) {
    if (depth == chosen.size()) return fit(so_far).ok();
    const Lever& lever = levers[chosen[depth]];
    for (const Alternative& alternative : lever.alternatives) {
      Scenario changed = so_far;
      alternative.apply(&changed);
      remedy->push_back({lever.option, alternative.value, alternative.note});
      if (pull(changed, depth + 1, remedy)) return true;
      remedy->pop_back();
    }
    return false;
  };
  Remedy remedy;
  if (pull(scenario, 0, &remedy)) remedies->push_back(std::move(remedy));
}

}  // namespace

MemoryOptions gpu_memory_options(MemoryOptions options, double share) {
  options.usable_share = share;
  options.reserve_bytes = kGpuReserveBytes;
  options.default_contexts = int64_t{1} << 20;
  return options;
}

std::optional<Fp8Recipe> plan_recipe_named(std::string_view name) {
  for (const NamedRecipe& named : kRecipes) {
    if (named.name == name) return named.recipe;
  }
  return std::nullopt;
}

RankResources resources_of_rank(const Scenario& scenario) {
  if (scenario.gpu) return {.memory_bytes = scenario.gpu->memory_bytes};
  return {.memory_bytes = scenario.memory_bytes.value_or(scenario.machine.memory_bytes / scenario.ranks),
          .threads = scenario.threads.value_or(std::max(1, scenario.machine.threads / scenario.ranks))};
}

absl::StatusOr<MemoryPlan> fit(const Scenario& scenario) {
  return plan_memory(scenario.formats, scenario.memory,
                     std::vector<RankResources>(scenario.ranks, resources_of_rank(scenario)));
}

std::vector<Remedy> find_remedies(const Scenario& scenario) {
  const std::vector<Lever> levers = {recipe_lever(scenario),    ranks_lever(scenario), context_lever(scenario),
                                     kv_memory_lever(scenario), gpu_lever(scenario),   memory_lever(scenario)};
  constexpr size_t kRecipe = 0, kRanks = 1;
  std::vector<Remedy> remedies;
  try_together(scenario, levers, {kRecipe}, &remedies);
  try_together(scenario, levers, {kRanks}, &remedies);
  // With the machines that somebody has, before he is sent to buy others.
  if (remedies.empty()) try_together(scenario, levers, {kRecipe, kRanks}, &remedies);
  for (size_t i = kRanks + 1; i < levers.size(); ++i) try_together(scenario, levers, {i}, &remedies);
  for (size_t i = 0; remedies.empty() && i < levers.size(); ++i) {
    for (size_t j = i + 1; j < levers.size(); ++j) {
      if (levers[i].option != levers[j].option) try_together(scenario, levers, {i, j}, &remedies);
    }
  }
  return remedies;
}

std::string human_rate(double value, const char* unit) {
  const bool tera = value >= 1e12;
  return absl::StrFormat("%.4g %c%s", value / (tera ? 1e12 : 1e9), tera ? 'T' : 'G', unit);
}

AllReduceCost assumed_cpu_all_reduce() { return {.points = {{32 << 10, 20e-6}}, .bytes_per_second = 4e9}; }

RankSpeed speed_of(const GpuSpec& gpu) {
  constexpr double kH100Link = 450e9;
  // Best published: one-shot kernels over NVSwitch to 1 MiB, multimem above. Over PCIe a start takes three times as
  // long.
  constexpr double kStart = 6.5e-6, kPcieStart = 20e-6, kSlowestNvlink = 100e9;
  const std::vector<std::pair<double, double>> h100 = {{64 << 10, 6.6e-6}, {256 << 10, 7.4e-6}, {1 << 20, 10.3e-6},
                                                       {2 << 20, 18e-6},   {4 << 20, 27e-6},    {8 << 20, 46e-6},
                                                       {16 << 20, 87e-6}};
  const double start = gpu.link_bytes_per_second < kSlowestNvlink ? kPcieStart : kStart;
  const double slower = kH100Link / gpu.link_bytes_per_second;
  AllReduceCost cost{.points = {{32 << 10, start}}, .bytes_per_second = 270e9 / slower};
  for (const auto& [bytes, seconds] : h100) cost.points.push_back({bytes, start + (seconds - kStart) * slower});
  return {.bytes_per_second = gpu.bytes_per_second,
          .bf16_flops = gpu.bf16_flops,
          .fp8_flops = gpu.fp8_flops,
          .all_reduce = std::move(cost)};
}

}  // namespace octet
