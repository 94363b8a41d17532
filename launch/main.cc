// octet: one binary, many commands. Only `serve`, `batch` and `doctor` touch MPI.
#include <CLI/CLI.hpp>

#include "launch/batch.h"
#include "launch/bench.h"
#include "launch/convert.h"
#include "launch/doctor.h"
#include "launch/generate.h"
#include "launch/inspect.h"
#include "launch/plan.h"
#include "launch/rehearse.h"
#include "launch/serve.h"
#include "launch/version.h"

// The exit status of a command line that cannot be understood, as shells have it.
constexpr int kUsage = 2;

int main(int argc, char** argv) {
  CLI::App app(
      "Octet serves Llama models, sharded over the ranks of mpirun or srun: the same answer bit for bit on any number "
      "of "
      "them.");
  app.set_version_flag("--version", std::string("octet ") + octet::kVersion);
  app.require_subcommand(1);
  app.footer(
      "A first session:\n"
      "  octet convert SmolLM2-135M-Instruct.gguf smollm2-fp8      an FP8 checkpoint from a GGUF file\n"
      "  octet inspect smollm2-fp8 --ranks 3                       what it is, and what each rank would hold\n"
      "  mpirun -np 3 octet serve --model smollm2-fp8              a server on 127.0.0.1:50051\n"
      "  octet generate --address 127.0.0.1:50051 --chat \"Hi!\"     an answer, as it is made");
  int exit_code = 0;
  octet::add_serve_command(app, &exit_code);
  octet::add_batch_command(app, &exit_code);
  octet::GenerateOptions generate;
  octet::add_generate_command(app, &generate)->callback([&] { exit_code = octet::run_generate(generate); });
  octet::add_convert_command(app, &exit_code);
  octet::add_inspect_command(app, &exit_code);
  octet::add_plan_command(app, &exit_code);
  octet::add_rehearse_command(app, &exit_code);
  octet::add_doctor_command(app, &exit_code);
  octet::add_bench_command(app, &exit_code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kUsage;  // 0: --help
  }
  return exit_code;
}
