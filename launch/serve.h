// octet serve: one rank of a server. Under mpirun or srun every rank runs this; rank 0 is also the coordinator.
#pragma once

#include <CLI/CLI.hpp>

namespace octet {

// Adds the command to `app`; when it is chosen, runs it and sets *exit_code.
void add_serve_command(CLI::App& app, int* exit_code);

}  // namespace octet
