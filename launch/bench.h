// octet bench: how fast this machine runs a model, as shares of what it can do at all, measured in the same run.
#pragma once

#include <CLI/CLI.hpp>

namespace octet {

// Adds the command to `app`; when it is chosen, runs it and sets *exit_code.
void add_bench_command(CLI::App& app, int* exit_code);

}  // namespace octet
