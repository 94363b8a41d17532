// octet convert: an FP8 checkpoint from a GGUF file or an unquantised Hugging Face directory.
#pragma once

#include <CLI/CLI.hpp>

namespace octet {

// Adds the command to `app`; when it is chosen, runs it and sets *exit_code.
void add_convert_command(CLI::App& app, int* exit_code);

}  // namespace octet
