// octet rehearse: what one rank of several would take for its steps, measured on this machine without the others.
#pragma once

#include <CLI/CLI.hpp>

namespace octet {

// Adds the command to `app`; when it is chosen, runs it and sets *exit_code: 0 done, 1 it does not fit or a step
// failed, 2 a mistake.
void add_rehearse_command(CLI::App& app, int* exit_code);

}  // namespace octet
