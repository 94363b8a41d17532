// octet plan: whether a model fits, before anything is loaded or any machine is booked.
#pragma once

#include <CLI/CLI.hpp>

namespace octet {

// Adds the command to `app`; when it is chosen, runs it and sets *exit_code: 0 fits, 1 does not fit, 2 a mistake.
void add_plan_command(CLI::App& app, int* exit_code);

}  // namespace octet
