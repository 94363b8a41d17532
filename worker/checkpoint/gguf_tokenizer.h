// The tokenizer inside a GGUF file as Hugging Face files: a tokenizer.json that encodes as the model's original one
// does, and a tokenizer_config.json with its chat template. Byte-level BPE of the kinds that Octet serves only.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "worker/checkpoint/gguf.h"

namespace octet {

struct TokenizerFiles {
  std::string tokenizer_json;
  std::string tokenizer_config_json;
};

// UNIMPLEMENTED, naming it, for another tokenizer model or pre-tokenizer; INVALID_ARGUMENT for metadata that contradict
// themselves.
absl::StatusOr<TokenizerFiles> tokenizer_files(const GgufFile& gguf);

}  // namespace octet
