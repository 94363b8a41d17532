// Tokenizer: text to token ids and back, as a Hugging Face tokenizer.json with byte-level BPE says (the Llama 3 family,
// SmolLM2, GPT-2 and their neighbours). Invariant: ids are those of the Hugging Face `tokenizers` library for the same
// file.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace octet {

// Immutable; any number of threads may use one at the same time. Copies share everything and are cheap.
class Tokenizer {
 public:
  // Reads tokenizer.json, tokenizer_config.json (optional) and chat_template.jinja (optional, wins over the config's).
  // NOT_FOUND without tokenizer.json, INVALID_ARGUMENT for a file that contradicts itself, UNIMPLEMENTED for a
  // tokenizer of another kind; messages name the file and the part.
  static absl::StatusOr<Tokenizer> load(const std::string& model_directory);

  // The same from the files' contents; an empty tokenizer_config_json is an absent one.
  static absl::StatusOr<Tokenizer> parse(std::string_view tokenizer_json, std::string_view tokenizer_config_json = {});

  // The ids of text. Invalid UTF-8 becomes U+FFFD first. The names of special tokens inside text are plain text unless
  // parse_special, so text from outside cannot forge a turn. add_special puts what the file's post-processor adds (for
  // Llama 3 the BOS token) around the ids. REQUIRES: text.size() < 2^31.
  std::vector<int32_t> encode(std::string_view text, bool add_special, bool parse_special = false) const;

  // What a token stands for: bytes that need not be whole characters; for added tokens their name. Empty for an id that
  // is no token, which a model whose output is wider than its tokenizer can produce.
  std::string_view bytes_of(int32_t id) const;
  bool is_special(int32_t id) const;
  std::optional<int32_t> special_id(std::string_view text) const;

  // All tokens' bytes as text; broken UTF-8 becomes U+FFFD. For a stream of tokens see Detokenizer.
  std::string decode(std::span<const int32_t> ids, bool skip_special = true) const;

  // One above the largest id.
  int32_t vocab_size() const;
  // What tokenizer_config.json calls bos_token, else the first token that the post-processor puts before a text.
  std::optional<int32_t> bos_token_id() const;
  // From chat_template.jinja or tokenizer_config.json; empty when the model has none.
  const std::string& chat_template() const;

 private:
  struct Parts;
  explicit Tokenizer(std::shared_ptr<const Parts> parts) : parts_(std::move(parts)) {}
  static absl::StatusOr<Tokenizer> build(std::string_view tokenizer_json, std::string_view tokenizer_config_json,
                                         std::optional<std::string> chat_template);

  std::shared_ptr<const Parts> parts_;
};

}  // namespace octet
