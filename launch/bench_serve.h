// octet bench serve: load on a running server, and what its clients see of it. Ends with a look at the server itself:
// whoever is gone must have left nothing behind.
#pragma once

#include <CLI/CLI.hpp>

namespace octet {

// Adds `serve` to the command `bench`; when it is chosen, runs it and sets *exit_code.
CLI::App* add_bench_serve_command(CLI::App& bench, int* exit_code);

}  // namespace octet
