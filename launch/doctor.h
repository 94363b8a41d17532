// octet doctor: looks at the ranks that it is given, and at what lies between them, before a server is started there;
// or at what the ranks of a job that failed have left.
#pragma once

#include <CLI/CLI.hpp>

namespace octet {

// Adds the command to `app`; when it is chosen, runs it and sets *exit_code: 0 all is well or doubtful, 1 something is
// wrong.
void add_doctor_command(CLI::App& app, int* exit_code);

}  // namespace octet
