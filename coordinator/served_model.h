// ServedModel: what the services need to know of the model behind the engine, as plain data. Filled once by launch,
// read by any thread afterwards.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/text/chat_format.h"
#include "coordinator/text/tokenizer.h"
#include "worker/model/model_config.h"
#include "worker/step_plan.h"

namespace octet {

struct ServedModel {
  std::string name;          // the directory's name
  std::string architecture;  // "LlamaForCausalLM"
  std::string quant_method;  // "fbgemm_fp8", ..., "none"
  int64_t parameters = 0;
  WorkerLimits limits;  // of the engine's workers
  Tokenizer tokenizer;
  absl::StatusOr<ChatFormat> chat;     // or why this model takes plain prompts only
  GenerationConfig generation_config;  // defaults of requests that do not say
  std::vector<int32_t>
      eos_token_ids;  // config.json's and generation_config.json's together; the chat format adds its own
};

// What ControlService says about the server itself.
struct ServerFacts {
  std::string version;
  std::string numerics_id;
  int32_t ranks = 1;
  int32_t threads_per_rank = 1;
  std::string device;  // "cpu"
  std::string isa;     // "avx512"
  bool reproducible = true;
};

}  // namespace octet
