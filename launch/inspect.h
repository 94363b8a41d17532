// octet inspect: what a checkpoint is, and what each rank would hold of it. Reads headers only.
#pragma once

#include <CLI/CLI.hpp>

namespace octet {

// Adds the command to `app`; when it is chosen, runs it and sets *exit_code.
void add_inspect_command(CLI::App& app, int* exit_code);

}  // namespace octet
