#include "launch/convert.h"

#include <atomic>
#include <cstdio>
#include <memory>
#include <string>

#include "launch/interrupt.h"
#include "launch/progress.h"
#include "worker/checkpoint/converter.h"

namespace octet {
namespace {

int run_convert(ConvertOptions options) {
  std::atomic<bool> cancelled{false};
  const Interrupt interrupt([&cancelled] { cancelled = true; });
  Progress progress("Converting");
  int64_t total = 0;
  options.cancelled = &cancelled;
  options.progress = [&](const ConvertProgress& now) {
    total = now.bytes_total;
    progress.update(now.bytes_done, now.bytes_total);
  };
  const absl::Status status = convert(options);
  if (!status.ok()) {
    std::fprintf(stderr, "octet convert: %s\n", std::string(status.message()).c_str());
    return interrupt.signal() != 0 ? 128 + interrupt.signal() : 1;
  }
  progress.finish(total);
  return 0;
}

}  // namespace

void add_convert_command(CLI::App& app, int* exit_code) {
  auto options = std::make_shared<ConvertOptions>();
  CLI::App* command =
      app.add_subcommand("convert", "Write an FP8 (or BF16) checkpoint from a GGUF file or a directory");
  command->footer(
      "octet convert SmolLM2-135M-Instruct.gguf smollm2-fp8\n"
      "octet convert Llama-3.1-8B-Instruct Llama-3.1-8B-Instruct-FP8 --fp8 all\n"
      "DST appears whole or not at all; a conversion needs the memory of a few rows of tensors.");
  command->add_option("SRC", options->source, "A GGUF file, or a Hugging Face directory in BF16, F16 or F32")
      ->required();
  command->add_option("DST", options->destination, "The directory to write; must not exist")->required();
  command
      ->add_option_function<std::string>(
          "--fp8", [options](const std::string& name) { options->recipe = *fp8_recipe_named(name); },
          "What becomes FP8: ffn (Meta's recipe: feed forward of all but the first and last layer), all (every linear "
          "layer "
          "of every block), none (BF16) [ffn]")
      ->check(CLI::IsMember({"ffn", "all", "none"}));
  command->callback([options, exit_code] { *exit_code = run_convert(*options); });
}

}  // namespace octet
