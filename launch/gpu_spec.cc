#include "launch/gpu_spec.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace octet {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr double kGiga = 1e9, kTera = 1e12;

}  // namespace

const std::vector<GpuSpec>& known_gpus() {
  // Datasheets; FLOPs without sparsity.
  static const std::vector<GpuSpec> kGpus = {
      {"A100-40GB", 40960 * kMiB, 1.555 * kTera, 312 * kTera, 0, 300 * kGiga},
      {"L40S-48GB", 46068 * kMiB, 0.864 * kTera, 362 * kTera, 733 * kTera, 32 * kGiga},
      {"H100-80GB", 81559 * kMiB, 3.35 * kTera, 989.5 * kTera, 1979 * kTera, 450 * kGiga},
      {"A100-80GB", 81920 * kMiB, 2.039 * kTera, 312 * kTera, 0, 300 * kGiga},
      {"H200-141GB", 143771 * kMiB, 4.8 * kTera, 989.5 * kTera, 1979 * kTera, 450 * kGiga},
      {"B200-180GB", 183359 * kMiB, 8.0 * kTera, 2250 * kTera, 4500 * kTera, 900 * kGiga},
  };
  return kGpus;
}

const GpuSpec* datasheet_of(const std::string& device_name) {
  const std::set<std::string> words = absl::StrSplit(device_name, absl::ByAnyChar(" -"));
  // PCIe and NVL cards of a family are slower, or larger, than its SXM modules, which the datasheets here are of.
  if (words.contains("PCIe") || words.contains("PCIE") || words.contains("NVL")) return nullptr;
  // Of a family with one size of memory the driver names only the family.
  const bool says_memory = std::ranges::any_of(words, [](const auto& word) { return absl::EndsWith(word, "GB"); });
  for (const GpuSpec& gpu : known_gpus()) {
    const std::pair<std::string, std::string> family_and_memory = absl::StrSplit(gpu.name, '-');
    const auto& [family, memory] = family_and_memory;
    if (words.contains(family) && (!says_memory || words.contains(memory))) return &gpu;
  }
  return nullptr;
}

absl::StatusOr<GpuChoice> parse_gpus(const std::string& text) {
  std::vector<std::string> names;
  for (const GpuSpec& gpu : known_gpus()) names.push_back(gpu.name);
  const auto refuse = [&] {
    return absl::InvalidArgumentError(
        absl::StrCat("--gpus is a number and a GPU, like 8xH100-80GB, or a number alone, 8x, with --gpu-memory, "
                     "--gpu-bandwidth and --gpu-flops; known GPUs: ",
                     absl::StrJoin(names, ", "), "; found \"", text, "\""));
  };
  GpuChoice choice{.count = 1};
  absl::string_view name = text;
  if (const size_t times = name.find('x'); times != absl::string_view::npos) {
    if (!absl::SimpleAtoi(name.substr(0, times), &choice.count) || choice.count < 1) return refuse();
    name.remove_prefix(times + 1);
    if (name.empty()) return choice;
  }
  for (const GpuSpec& gpu : known_gpus()) {
    if (gpu.name != name) continue;
    choice.gpu = gpu;
    return choice;
  }
  return refuse();
}

}  // namespace octet
