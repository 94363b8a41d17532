// The shapes of models that can be planned for without their files.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "worker/model/model_config.h"

namespace octet {

// "llama-3.1-8b", ..., smallest first.
std::vector<std::string> known_models();
// Nothing for other names.
std::optional<ModelConfig> known_model_config(std::string_view name);

}  // namespace octet
