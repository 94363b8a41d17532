#include "launch/rehearsal_report.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "launch/capacity.h"
#include "launch/svg.h"

namespace octet {
namespace {

using nlohmann::ordered_json;

// The local part of a sum is counted in both.
const char* const kFormula =
    "predicted: step on all ranks = step of this rank + 2 x layers x all-reduce, with nothing overlapped";

std::string name_of(const StepMeasurement& step) {
  return step.prefill ? absl::StrCat("prefill ", step.load.new_tokens) : absl::StrCat("decode ", step.load.sequences);
}

// "1.234 s", "12.3 ms", "4.56 us"
std::string time_text(double seconds) {
  if (seconds >= 1) return absl::StrFormat("%.4g s", seconds);
  if (seconds >= 1e-3) return absl::StrFormat("%.4g ms", 1e3 * seconds);
  return absl::StrFormat("%.3g us", 1e6 * seconds);
}

std::string percent(double share) { return absl::StrFormat("%.1f %%", 100 * share); }

// How near a part comes to what bounds it: reading (r) or computing (c). Nothing where it has neither to do.
std::string bound_text(const StepMeasurement& step, const PartWork& work, double seconds) {
  const double reading = step.seconds_to_read(work), computing = step.seconds_to_compute(work);
  if (std::max(reading, computing) == 0 || seconds == 0) return "";
  return absl::StrFormat("%.0f %%%c", 100 * std::max(reading, computing) / seconds, reading >= computing ? 'r' : 'c');
}

std::string head_text(const RehearsalReport& report) {
  const RankBytes& bytes = report.bytes;
  const int64_t filled = bytes.weights.total();
  std::string text = absl::StrFormat(
      "%s, %s, %s activations: rank %d of %d, %d of %d layers, on %s\n"
      "%s of weights (filled at %.2f GB/s), %s of KV cache in %s, %s of scratch; %s are usable\n",
      report.model, report.recipe, report.activations, report.rank, report.ranks, report.layers, report.layers_of_model,
      report.device, human_bytes(filled), static_cast<double>(filled) / 1e9 / std::max(report.fill_seconds, 1e-9),
      human_bytes(bytes.kv_cache), name_of(report.kv_dtype), human_bytes(bytes.scratch),
      human_bytes(report.usable_bytes));
  if (report.layers < report.layers_of_model) {
    absl::StrAppend(&text, "Every figure is of these layers, the embedding and the logits; none is scaled up.\n");
  }
  return text;
}

std::string steps_text(const RehearsalReport& report) {
  std::string text =
      absl::StrFormat("%-12s %7s %9s %21s %9s %10s %7s %7s %7s | %9s %9s\n", "step", "context", "time", "from .. to",
                      "tokens/s", "reads", "GB/s", "of read", "of peak", "predicted", "tokens/s");
  for (const StepMeasurement& step : report.steps) {
    const PartWork work = step.work.total();
    const double predicted = report.predicted_seconds(step);
    absl::StrAppendFormat(
        &text, "%-12s %7d %9s %21s %9.1f %10s %7.2f %7s %7s | %9s %9.1f\n", name_of(step), step.load.context,
        time_text(step.seconds), absl::StrCat(time_text(step.least_seconds), " .. ", time_text(step.most_seconds)),
        tokens_per_second(step, step.seconds), human_bytes(static_cast<int64_t>(work.bytes())),
        work.bytes() / step.seconds / 1e9, percent(step.of_read), step.peak.bf16 > 0 ? percent(step.of_peak) : "-",
        time_text(predicted), tokens_per_second(step, predicted));
  }
  return text;
}

std::string notes_text(const RehearsalReport& report) {
  const StepMeasurement& step = report.steps.front();
  std::string peak = step.peak.source;
  if (step.peak.bf16 > 0) {
    peak = absl::StrCat("of ", human_rate(step.peak.bf16, "FLOP/s"), " in BF16, ", human_rate(step.peak.fp8, "FLOP/s"),
                        " in FP8 (", step.peak.source, ")");
  }
  std::string text =
      absl::StrCat("reads: weights and KV cache, once; of read: of ", human_rate(step.read_bytes_per_second, "B/s"),
                   ", measured on the weights in turns with the steps;\nof peak: ", peak, "\n");
  if (report.ranks == 1) return text;
  absl::StrAppend(&text, kFormula, "\nan all-reduce of ", report.ranks, " ranks takes ",
                  time_text(report.all_reduce_seconds(step)),
                  " in the first of these steps: ", report.all_reduce_source, "\n");
  return text;
}

std::string parts_text(const RehearsalReport& report) {
  std::string text = absl::StrFormat("%-12s", "ms");
  for (const StepMeasurement& step : report.steps) absl::StrAppendFormat(&text, " %18s", name_of(step));
  text += "\n";
  for (const StepPart part : kStepParts) {
    absl::StrAppendFormat(&text, "%-12s", name_of(part));
    for (const StepMeasurement& step : report.steps) {
      const double seconds = step.part_seconds[static_cast<size_t>(part)];
      absl::StrAppendFormat(&text, " %10.3f %7s", 1e3 * seconds, bound_text(step, step.work[part], seconds));
    }
    text += "\n";
  }
  absl::StrAppendFormat(&text, "%-12s", "sum");
  for (const StepMeasurement& step : report.steps) {
    absl::StrAppendFormat(&text, " %10.3f %7s", 1e3 * step.probed_seconds, "");
  }
  return text +
         "\nof one step more, op by op, measured part by part; r: share of the read bandwidth, c: of the peak, "
         "whichever is nearer\n";
}

ordered_json json_of(const PartWork& work) {
  return {{"weight_bytes", work.weight_bytes},
          {"kv_bytes", work.kv_bytes},
          {"bf16_flops", work.bf16_flops},
          {"fp8_flops", work.fp8_flops}};
}

ordered_json parts_json(const StepMeasurement& step) {
  ordered_json parts = ordered_json::array();
  for (const StepPart part : kStepParts) {
    const double seconds = step.part_seconds[static_cast<size_t>(part)];
    const PartWork& work = step.work[part];
    ordered_json row = {{"part", name_of(part)}, {"seconds", seconds}};
    row.update(json_of(work));
    row["share_of_read"] = seconds > 0 ? step.seconds_to_read(work) / seconds : 0;
    row["share_of_peak"] = seconds > 0 ? step.seconds_to_compute(work) / seconds : 0;
    parts.push_back(std::move(row));
  }
  return parts;
}

ordered_json step_json(const RehearsalReport& report, const StepMeasurement& step) {
  const PartWork work = step.work.total();
  ordered_json json = {{"kind", step.prefill ? "prefill" : "decode"},
                       {"sequences", step.load.sequences},
                       {"new_tokens", step.load.new_tokens},
                       {"context", step.load.context},
                       {"seconds", step.seconds},
                       {"least_seconds", step.least_seconds},
                       {"most_seconds", step.most_seconds},
                       {"tokens_per_second", tokens_per_second(step, step.seconds)}};
  json.update(json_of(work));
  json.update(ordered_json{{"read_bytes_per_second", step.read_bytes_per_second},
                           {"share_of_read", step.of_read},
                           {"peak_bf16_flops", step.peak.bf16},
                           {"peak_fp8_flops", step.peak.fp8},
                           {"peak_source", step.peak.source},
                           {"share_of_peak", step.of_peak},
                           {"probed_seconds", step.probed_seconds},
                           {"parts", parts_json(step)}});
  const double predicted = report.predicted_seconds(step);
  json["predicted"] = {{"ranks", report.ranks},
                       {"all_reduce_seconds", report.all_reduce_seconds(step)},
                       {"seconds", predicted},
                       {"tokens_per_second", tokens_per_second(step, predicted)}};
  return json;
}

}  // namespace

double RehearsalReport::all_reduce_seconds(const StepMeasurement& step) const {
  const int64_t bytes = step.load.sequences * step.load.new_tokens * hidden_size * size_of(DType::kBF16);
  return ranks == 1 ? 0 : all_reduce.seconds(static_cast<double>(bytes));
}

double RehearsalReport::predicted_seconds(const StepMeasurement& step) const {
  return step.seconds + 2 * static_cast<double>(layers) * all_reduce_seconds(step);
}

double tokens_per_second(const StepMeasurement& step, double seconds) {
  return static_cast<double>(step.load.sequences * step.load.new_tokens) / seconds;
}

std::string to_text(const RehearsalReport& report) {
  return absl::StrCat(head_text(report), "\n", steps_text(report), notes_text(report), "\n", parts_text(report));
}

ordered_json to_json(const RehearsalReport& report) {
  const WeightBytes& weights = report.bytes.weights;
  ordered_json steps = ordered_json::array();
  for (const StepMeasurement& step : report.steps) steps.push_back(step_json(report, step));
  return {{"model", report.model},
          {"recipe", report.recipe},
          {"activations", report.activations},
          {"kv_dtype", report.kv_dtype == DType::kF8E4M3 ? "fp8" : "bf16"},
          {"device", report.device},
          {"rank", report.rank},
          {"ranks", report.ranks},
          {"layers", report.layers},
          {"layers_of_model", report.layers_of_model},
          {"bytes",
           {{"embedding", weights.embedding},
            {"attention", weights.attention},
            {"feed_forward", weights.feed_forward},
            {"lm_head", weights.lm_head},
            {"norms", weights.norms},
            {"scales", weights.scales},
            {"weights", weights.total()},
            {"kv_cache", report.bytes.kv_cache},
            {"scratch", report.bytes.scratch},
            {"usable", report.usable_bytes}}},
          {"fill_seconds", report.fill_seconds},
          {"prediction", {{"formula", kFormula}, {"all_reduce_source", report.all_reduce_source}}},
          {"steps", std::move(steps)}};
}

std::string to_svg(const RehearsalReport& report) {
  constexpr int kTop = 66, kBar = 22, kGap = 8, kLeft = 120, kWidth = 560, kLegendColumns = 4;
  constexpr std::array<const char*, kStepParts.size()> kColours = {
      "#999999", "#b8a1d9", "#d9c9a1", "#1f4e79", "#8ab6d6", "#c77f2f", "#3b6ea5",
      "#b03a48", "#5b8c5a", "#cfe0c3", "#7fae7e", "#6b4c9a", "#444444"};
  const int legend = kTop + static_cast<int>(report.steps.size()) * (kBar + kGap) + 16;
  const int rows = (static_cast<int>(kStepParts.size()) + kLegendColumns - 1) / kLegendColumns;
  std::string svg =
      svg_begin(legend + rows * 18, "What a step is made of",
                absl::StrFormat("%s, %s: rank %d of %d, %d of %d layers, on %s", report.model, report.recipe,
                                report.rank, report.ranks, report.layers, report.layers_of_model, report.device));
  int y = kTop;
  for (const StepMeasurement& step : report.steps) {
    absl::StrAppendFormat(&svg, "<text x='12' y='%d'>%s</text>\n", y + 16, name_of(step));
    double x = kLeft;
    for (size_t part = 0; part < kStepParts.size(); ++part) {
      const double width = kWidth * step.part_seconds[part] / step.probed_seconds;
      absl::StrAppendFormat(&svg, "<rect x='%.1f' y='%d' width='%.1f' height='%d' fill='%s'/>\n", x, y, width, kBar,
                            kColours[part]);
      x += width;
    }
    y += kBar + kGap;
  }
  for (size_t part = 0; part < kStepParts.size(); ++part) {
    const int at_x = 12 + static_cast<int>(part) % kLegendColumns * 170;
    const int at_y = legend + static_cast<int>(part) / kLegendColumns * 18;
    absl::StrAppendFormat(&svg, "<rect x='%d' y='%d' width='12' height='12' fill='%s'/><text x='%d' y='%d'>%s</text>\n",
                          at_x, at_y - 10, kColours[part], at_x + 18, at_y, name_of(kStepParts[part]));
  }
  return svg + "</svg>\n";
}

}  // namespace octet
