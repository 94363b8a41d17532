#include "worker/checkpoint/gguf_tokenizer.h"

#include <algorithm>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace octet {
namespace {

using nlohmann::json;

// GGUF's tokenizer.ggml.token_type.
constexpr int64_t kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5;

// How text is cut before BPE, and what the model's original tokenizer.json says besides.
struct Family {
  json pre_tokenizer;
  bool ignore_merges = false;  // a piece that is in the vocabulary is taken whole
  bool adds_bos = false;       // where the file does not say
};

json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
}

std::optional<Family> family_named(const std::string& pre) {
  if (pre == "smollm") {
    const json digits = {{"type", "Digits"}, {"individual_digits", true}};
    return Family{.pre_tokenizer = {{"type", "Sequence"}, {"pretokenizers", {digits, byte_level(true)}}}};
  }
  if (pre == "llama-bpe" || pre == "llama3" || pre == "llama-v3") {
    constexpr const char* kPattern =
        R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
    const json split = {
        {"type", "Split"}, {"pattern", {{"Regex", kPattern}}}, {"behavior", "Isolated"}, {"invert", false}};
    return Family{.pre_tokenizer = {{"type", "Sequence"}, {"pretokenizers", {split, byte_level(false)}}},
                  .ignore_merges = true,
                  .adds_bos = true};
  }
  return std::nullopt;
}

class TokenizerBuilder {
 public:
  explicit TokenizerBuilder(const GgufFile& gguf) : gguf_(gguf) {}

  absl::StatusOr<TokenizerFiles> build() {
    if (absl::Status status = read_family(); !status.ok()) return status;
    if (absl::Status status = read_tokens(); !status.ok()) return status;
    if (absl::Status status = read_merges(); !status.ok()) return status;
    if (absl::Status status = read_special_ids(); !status.ok()) return status;
    // Invalid UTF-8 in a token's name is replaced rather than thrown at us.
    const auto text = [](const json& value) { return value.dump(1, ' ', false, json::error_handler_t::replace); };
    absl::StatusOr<json> config = tokenizer_config();
    if (!config.ok()) return config.status();
    return TokenizerFiles{.tokenizer_json = text(tokenizer()), .tokenizer_config_json = text(*config)};
  }

 private:
  template <typename T>
  absl::StatusOr<T> required(const std::string& key) {
    absl::StatusOr<std::optional<T>> value = gguf_.get<T>(key);
    if (!value.ok()) return value.status();
    if (!value->has_value()) return invalid(absl::StrCat("has no metadata key ", key));
    return std::move(**value);
  }

  absl::Status invalid(const std::string& fault) const {
    return absl::InvalidArgumentError(absl::StrCat(gguf_.path(), " ", fault));
  }

  absl::Status read_family() {
    absl::StatusOr<std::string> model = required<std::string>("tokenizer.ggml.model");
    if (!model.ok()) return model.status();
    if (*model != "gpt2") {
      return absl::UnimplementedError(absl::StrCat(gguf_.path(), ": tokenizer.ggml.model is \"", model->substr(0, 40),
                                                   "\"; supported: \"gpt2\" (byte-level BPE)"));
    }
    absl::StatusOr<std::string> pre = required<std::string>("tokenizer.ggml.pre");
    if (!pre.ok()) return pre.status();
    std::optional<Family> family = family_named(*pre);
    if (!family) {
      return absl::UnimplementedError(absl::StrCat(gguf_.path(), ": tokenizer.ggml.pre is \"", pre->substr(0, 40),
                                                   "\"; supported: \"smollm\", \"llama-bpe\""));
    }
    family_ = *std::move(family);
    return absl::OkStatus();
  }

  absl::Status read_tokens() {
    absl::StatusOr<std::vector<std::string>> tokens = required<std::vector<std::string>>("tokenizer.ggml.tokens");
    if (!tokens.ok()) return tokens.status();
    absl::StatusOr<std::vector<int64_t>> types = required<std::vector<int64_t>>("tokenizer.ggml.token_type");
    if (!types.ok()) return types.status();
    tokens_ = *std::move(tokens);
    types_ = *std::move(types);
    if (tokens_.empty() || tokens_.size() != types_.size() || tokens_.size() > (size_t{1} << 24)) {
      return invalid(absl::StrCat("has ", tokens_.size(), " tokens and ", types_.size(), " token types"));
    }
    for (size_t id = 0; id < tokens_.size(); ++id) {
      if (!ids_.emplace(tokens_[id], id).second) {
        return invalid(absl::StrCat("has the token \"", tokens_[id].substr(0, 60), "\" twice"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status read_merges() {
    absl::StatusOr<std::vector<std::string>> merges = required<std::vector<std::string>>("tokenizer.ggml.merges");
    if (!merges.ok()) return merges.status();
    for (const std::string& merge : *merges) {
      const size_t space = merge.find(' ', 1);
      const bool is_pair = space != std::string::npos && space + 1 < merge.size();
      const std::string left = merge.substr(0, space), right = is_pair ? merge.substr(space + 1) : "";
      if (!is_pair || !ids_.contains(left) || !ids_.contains(right) || !ids_.contains(left + right)) {
        return invalid(
            absl::StrCat("has the merge \"", merge.substr(0, 60), "\", which does not join two tokens to one"));
      }
    }
    merges_ = *std::move(merges);
    return absl::OkStatus();
  }

  absl::Status read_special_ids() {
    for (const char* name : {"bos", "eos", "padding", "unknown"}) {
      const std::string key = absl::StrCat("tokenizer.ggml.", name, "_token_id");
      absl::StatusOr<std::optional<int64_t>> id = gguf_.get<int64_t>(key);
      if (!id.ok()) return id.status();
      if (!id->has_value()) continue;
      if (**id < 0 || **id >= static_cast<int64_t>(tokens_.size())) {
        return invalid(absl::StrCat("says ", key, " ", **id, ", outside its ", tokens_.size(), " tokens"));
      }
      special_ids_[name] = **id;
    }
    absl::StatusOr<std::optional<bool>> adds_bos = gguf_.get<bool>("tokenizer.ggml.add_bos_token");
    if (!adds_bos.ok()) return adds_bos.status();
    adds_bos_ = adds_bos->value_or(family_.adds_bos);
    if (adds_bos_ && !special_ids_.contains("bos")) return invalid("adds a BOS token, but names none");
    absl::StatusOr<std::optional<bool>> adds_eos = gguf_.get<bool>("tokenizer.ggml.add_eos_token");
    if (!adds_eos.ok()) return adds_eos.status();
    if (adds_eos->value_or(false)) return invalid("appends an EOS token to every text, which no Llama model does");
    return absl::OkStatus();
  }

  bool is_added(size_t id) const {
    return types_[id] == kControl || types_[id] == kUserDefined || types_[id] == kUnknown;
  }

  // The vocabulary of the BPE model: without unused fillers, and without the added tokens at its end (Llama 3 has its
  // special tokens there; SmolLM2 has them inside the vocabulary).
  json vocabulary() const {
    size_t size = tokens_.size();
    while (size > 0 && (is_added(size - 1) || types_[size - 1] == kUnused)) --size;
    json vocabulary = json::object();
    for (size_t id = 0; id < size; ++id) {
      if (types_[id] != kUnused) vocabulary[tokens_[id]] = id;
    }
    return vocabulary;
  }

  json added_tokens() const {
    json added = json::array();
    for (size_t id = 0; id < tokens_.size(); ++id) {
      if (!is_added(id)) continue;
      added.push_back({{"id", id},
                       {"content", tokens_[id]},
                       {"single_word", false},
                       {"lstrip", false},
                       {"rstrip", false},
                       {"normalized", false},
                       {"special", types_[id] != kUserDefined}});
    }
    return added;
  }

  json post_processor() const {
    if (!adds_bos_) return nullptr;
    const int64_t id = special_ids_.at("bos");
    const std::string& bos = tokens_[static_cast<size_t>(id)];
    const auto token = [&](int type) { return json{{"SpecialToken", {{"id", bos}, {"type_id", type}}}}; };
    const auto text = [](const char* name, int type) { return json{{"Sequence", {{"id", name}, {"type_id", type}}}}; };
    const json tokens = {{bos, {{"id", bos}, {"ids", {id}}, {"tokens", {bos}}}}};
    const json bos_first = {{"type", "TemplateProcessing"},
                            {"single", {token(0), text("A", 0)}},
                            {"pair", {token(0), text("A", 0), token(1), text("B", 1)}},
                            {"special_tokens", tokens}};
    return {{"type", "Sequence"}, {"processors", {byte_level(true), bos_first}}};
  }

  json tokenizer() const {
    const json model = {{"type", "BPE"},
                        {"dropout", nullptr},
                        {"unk_token", nullptr},
                        {"continuing_subword_prefix", nullptr},
                        {"end_of_word_suffix", nullptr},
                        {"fuse_unk", false},
                        {"byte_fallback", false},
                        {"ignore_merges", family_.ignore_merges},
                        {"vocab", vocabulary()},
                        {"merges", merges_}};
    return {{"version", "1.0"},
            {"truncation", nullptr},
            {"padding", nullptr},
            {"added_tokens", added_tokens()},
            {"normalizer", nullptr},
            {"pre_tokenizer", family_.pre_tokenizer},
            {"post_processor", post_processor()},
            {"decoder", byte_level(true)},
            {"model", model}};
  }

  absl::StatusOr<json> tokenizer_config() const {
    json config = {{"tokenizer_class", "PreTrainedTokenizerFast"}, {"clean_up_tokenization_spaces", false}};
    const std::pair<const char*, const char*> names[] = {
        {"bos", "bos_token"}, {"eos", "eos_token"}, {"padding", "pad_token"}, {"unknown", "unk_token"}};
    for (const auto& [name, key] : names) {
      if (const auto id = special_ids_.find(name); id != special_ids_.end()) {
        config[key] = tokens_[static_cast<size_t>(id->second)];
      }
    }
    absl::StatusOr<std::optional<std::string>> chat_template = gguf_.get<std::string>("tokenizer.chat_template");
    if (!chat_template.ok()) return chat_template.status();
    if (chat_template->has_value()) config["chat_template"] = **chat_template;
    return config;
  }

  const GgufFile& gguf_;
  Family family_;
  std::vector<std::string> tokens_;
  std::vector<int64_t> types_;
  std::unordered_map<std::string, size_t> ids_;
  std::vector<std::string> merges_;
  std::map<std::string, int64_t> special_ids_;
  bool adds_bos_ = false;
};

}  // namespace

absl::StatusOr<TokenizerFiles> tokenizer_files(const GgufFile& gguf) { return TokenizerBuilder(gguf).build(); }

}  // namespace octet
