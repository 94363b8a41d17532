// octet batch: a file of requests in, a file of answers out, under mpirun or srun and without a server.
#pragma once

#include <CLI/CLI.hpp>

namespace octet {

// Adds the command to `app`; when it is chosen, runs it and sets *exit_code.
void add_batch_command(CLI::App& app, int* exit_code);

}  // namespace octet
