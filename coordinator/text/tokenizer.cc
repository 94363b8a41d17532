#include "coordinator/text/tokenizer.h"

#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "coordinator/text/added_tokens.h"
#include "coordinator/text/bpe.h"
#include "coordinator/text/cat.h"
#include "coordinator/text/pre_tokenizer.h"
#include "coordinator/text/tokenizer_json.h"
#include "coordinator/text/utf8.h"

namespace octet {
namespace {

using nlohmann::json;

absl::Status invalid(std::string_view what) { return absl::InvalidArgumentError(cat("tokenizer.json: ", what)); }
absl::Status unsupported(std::string_view what) { return absl::UnimplementedError(cat("tokenizer.json: ", what)); }

// Byte-level alphabet: GPT-2 spells every byte as a printable character. Printable Latin-1 spells itself, the other 68
// bytes take the characters from U+0100 on. This is the way back, indexed by code point; -1 where no byte is spelled
// so.
class ByteAlphabet {
 public:
  ByteAlphabet() {
    byte_of_.fill(-1);
    int next = 256;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
      byte_of_[printable ? byte : next++] = byte;
    }
  }

  // nullopt when the token is not spelled in the alphabet.
  std::optional<std::string> bytes(std::string_view spelling) const {
    std::string result;
    while (!spelling.empty()) {
      const Utf8Step step = utf8_step(spelling);
      if (step.kind != Utf8Step::kCharacter) return std::nullopt;
      const char32_t character = utf8_code_point(spelling);
      if (character >= byte_of_.size() || byte_of_[character] < 0) return std::nullopt;
      result.push_back(static_cast<char>(byte_of_[character]));
      spelling.remove_prefix(step.bytes);
    }
    return result;
  }

 private:
  std::array<int16_t, 256 + 68> byte_of_;
};

struct AddedToken {
  std::string content;
  int32_t id;
  bool special;
};

absl::StatusOr<AddedToken> read_added_token(const json& entry) {
  if (!entry.is_object() || !entry.contains("id") || !entry["id"].is_number_unsigned() || !entry.contains("content") ||
      !entry["content"].is_string()) {
    return invalid("an entry of added_tokens lacks a whole-number \"id\" or a \"content\" string");
  }
  AddedToken token{entry["content"].get<std::string>(), 0, false};
  const uint64_t id = entry["id"].get<uint64_t>();
  if (id >= static_cast<uint64_t>(kMaxVocabularySize)) {
    return invalid(cat("added token '", token.content, "' has id ", id, "; ids must be below ", kMaxVocabularySize));
  }
  token.id = static_cast<int32_t>(id);
  if (token.content.empty()) return invalid(cat("added token ", id, " has no content"));
  for (const char* name : {"special", "single_word", "lstrip", "rstrip"}) {
    const json value = entry.value(name, json(false));
    if (!value.is_boolean()) return invalid(cat("added token '", token.content, "': ", name, " is not a boolean"));
    if (std::string_view(name) == "special") {
      token.special = value.get<bool>();
    } else if (value.get<bool>()) {
      return unsupported(cat("added token '", token.content, "' asks for ", name, ", which is not supported"));
    }
  }
  return token;
}

absl::StatusOr<std::vector<AddedToken>> read_added_tokens(const json& file) {
  std::vector<AddedToken> tokens;
  const json list = file.value("added_tokens", json::array());
  if (!list.is_array()) return invalid("added_tokens is not a list");
  for (const json& entry : list) {
    absl::StatusOr<AddedToken> token = read_added_token(entry);
    if (!token.ok()) return token.status();
    tokens.push_back(*std::move(token));
  }
  return tokens;
}

// Absent, null, false, 0 and "" all mean that a feature is off.
bool is_off(const json& object, const char* name) {
  const auto value = object.find(name);
  return value == object.end() || value->is_null() || *value == json(false) || *value == json("") ||
         (value->is_number() && value->get<double>() == 0);
}

absl::Status check_model_kind(const json& model) {
  const json type = model.value("type", json("BPE"));
  if (type != "BPE") return unsupported(cat("model type ", type.dump(), " is not supported, only \"BPE\""));
  for (const char* name : {"dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!is_off(model, name)) return unsupported(cat("model.", name, " ", model[name].dump(), " is not supported"));
  }
  return absl::OkStatus();
}

absl::Status check_kind(const json& file) {
  if (!file.contains("model") || !file["model"].is_object()) return invalid("\"model\" is missing or not an object");
  const absl::Status model = check_model_kind(file["model"]);
  if (!model.ok()) return model;
  if (!is_off(file, "normalizer")) {
    const json& normalizer = file["normalizer"];
    const json type = normalizer.is_object() ? normalizer.value("type", json()) : normalizer;
    return unsupported(cat("normalizer ", type.dump(), " is not supported; byte-level models have none"));
  }
  const json decoder = file.value("decoder", json());
  const json decoder_type = decoder.is_object() ? decoder.value("type", json()) : json();
  if (decoder_type != "ByteLevel") {
    return unsupported(cat("decoder ", decoder_type.dump(), " is not supported, only \"ByteLevel\""));
  }
  return absl::OkStatus();
}

// The tokens by id, and which of them text can turn into (spelled in the byte alphabet, not special).
struct TokenTable {
  std::vector<std::optional<std::string>> by_id;
  std::vector<int32_t> textual;
  std::vector<bool> special;
  absl::flat_hash_map<std::string, int32_t> id_of_spelling;  // vocabulary only, as spelled in the file
};

absl::Status add_vocabulary(const TokenizerJson& file, TokenTable& table) {
  const ByteAlphabet alphabet;
  table.id_of_spelling.reserve(file.vocabulary.size());
  for (const TokenizerJson::VocabularyEntry& entry : file.vocabulary) {
    const std::string_view spelling = file.view(entry.token);
    if (entry.id >= static_cast<int32_t>(table.by_id.size())) table.by_id.resize(entry.id + 1);
    if (table.by_id[entry.id].has_value()) return invalid(cat("id ", entry.id, " appears twice in model.vocab"));
    if (!table.id_of_spelling.emplace(std::string(spelling), entry.id).second) {
      return invalid(cat("token '", spelling, "' appears twice in model.vocab"));
    }
    std::optional<std::string> bytes = alphabet.bytes(spelling);
    // As in the reference: what is not spelled in the alphabet stands for itself and never comes out of text.
    if (bytes.has_value() && !bytes->empty()) table.textual.push_back(entry.id);
    table.by_id[entry.id] = bytes.has_value() ? std::move(*bytes) : std::string(spelling);
  }
  return absl::OkStatus();
}

absl::Status add_added_tokens(const std::vector<AddedToken>& tokens, TokenTable& table) {
  absl::flat_hash_map<std::string, int32_t> seen;
  for (const AddedToken& token : tokens) {
    if (token.id >= static_cast<int32_t>(table.by_id.size())) table.by_id.resize(token.id + 1);
    const auto spelled = table.id_of_spelling.find(token.content);
    const bool in_vocabulary = spelled != table.id_of_spelling.end();
    if (in_vocabulary && spelled->second != token.id) {
      return invalid(
          cat("added token '", token.content, "' has id ", token.id, " but id ", spelled->second, " in model.vocab"));
    }
    if (!in_vocabulary && table.by_id[token.id].has_value()) {
      return invalid(cat("added token '", token.content, "' has id ", token.id, ", which belongs to '",
                         *table.by_id[token.id], "'"));
    }
    if (!seen.emplace(token.content, token.id).second) {
      return invalid(cat("added token '", token.content, "' appears twice"));
    }
    table.by_id[token.id] = token.content;
    table.special.resize(table.by_id.size(), false);
    table.special[token.id] = token.special;
  }
  table.special.resize(table.by_id.size(), false);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Bpe::Merge>> read_merges(const TokenizerJson& file, const TokenTable& table) {
  std::vector<Bpe::Merge> merges;
  merges.reserve(file.merges.size());
  const auto id_of = [&](std::string_view spelling) {
    const auto found = table.id_of_spelling.find(as_absl(spelling));
    return found == table.id_of_spelling.end() ? -1 : found->second;
  };
  std::string both;
  for (size_t i = 0; i < file.merges.size(); ++i) {
    const std::string_view left = file.view(file.merges[i].left);
    const std::string_view right = file.view(file.merges[i].right);
    both.assign(left).append(right);
    for (const std::string_view token : {left, right, std::string_view(both)}) {
      if (id_of(token) < 0) {
        return invalid(cat("merge ", i, " ('", left, "' + '", right, "') needs token '", token,
                           "', which model.vocab does not have"));
      }
    }
    merges.push_back({id_of(left), id_of(right), id_of(both)});
  }
  return merges;
}

absl::StatusOr<Bpe::Options> read_options(const json& model, const TokenTable& table) {
  Bpe::Options options;
  for (const auto& [name, target] :
       {std::pair("ignore_merges", &options.ignore_merges), std::pair("fuse_unk", &options.fuse_unknown)}) {
    const json value = model.value(name, json(false));
    if (!value.is_boolean()) return invalid(cat("model.", name, " is not a boolean"));
    *target = value.get<bool>();
  }
  const json unknown = model.value("unk_token", json());
  if (unknown.is_null()) return options;
  if (!unknown.is_string()) return invalid("model.unk_token is not a string");
  const auto found = table.id_of_spelling.find(unknown.get<std::string>());
  if (found == table.id_of_spelling.end()) {
    return invalid(cat("model.unk_token ", unknown.dump(), " is not in model.vocab"));
  }
  options.unknown_token = found->second;
  return options;
}

absl::StatusOr<Bpe> build_bpe(const TokenizerJson& file, const TokenTable& table) {
  absl::StatusOr<Bpe::Options> options = read_options(file.rest["model"], table);
  if (!options.ok()) return options.status();
  absl::StatusOr<std::vector<Bpe::Merge>> merges = read_merges(file, table);
  if (!merges.ok()) return merges.status();
  Vocabulary vocabulary(table.by_id);
  for (const int32_t id : table.textual) {
    if (!table.special[id]) vocabulary.index(id);
  }
  return Bpe(std::move(vocabulary), *merges, *options);
}

// A member of what should be an object; null when it is none or has no such member.
json member(const json& object, const std::string& name) {
  return object.is_object() ? object.value(name, json()) : json();
}

// What the post-processor puts before and after the ids of a single text.
struct Surroundings {
  std::vector<int32_t> before;
  std::vector<int32_t> after;
};

absl::Status read_template_piece(const json& piece, const json& special_tokens, int32_t vocab_size, bool& text_seen,
                                 Surroundings& around) {
  if (piece.is_object() && piece.contains("Sequence")) {
    if (text_seen) return unsupported("post_processor TemplateProcessing: \"single\" names the text twice");
    text_seen = true;
    return absl::OkStatus();
  }
  const json name = member(member(piece, "SpecialToken"), "id");
  const json ids = name.is_string() ? member(member(special_tokens, name.get<std::string>()), "ids") : json();
  if (!ids.is_array()) {
    return invalid(cat("post_processor TemplateProcessing: ", piece.dump(), " is not listed in special_tokens"));
  }
  for (const json& id : ids) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= static_cast<uint64_t>(vocab_size)) {
      return invalid(cat("post_processor TemplateProcessing: ", id.dump(), " is not a token id"));
    }
    (text_seen ? around.after : around.before).push_back(id.get<int32_t>());
  }
  return absl::OkStatus();
}

absl::Status add_post_processor(const json& config, int32_t vocab_size, Surroundings& around) {
  const json type = member(config, "type");
  if (config.is_null() || type == "ByteLevel") return absl::OkStatus();  // ByteLevel only moves offsets
  if (type == "Sequence" && config.value("processors", json()).is_array()) {
    for (const json& step : config["processors"]) {
      const absl::Status status = add_post_processor(step, vocab_size, around);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }
  if (type != "TemplateProcessing") {
    return unsupported(cat("post_processor ", type.dump(),
                           " is not supported, only ByteLevel, TemplateProcessing and a Sequence of those"));
  }
  const json single = member(config, "single");
  const json special_tokens = member(config, "special_tokens");
  if (!single.is_array() || !special_tokens.is_object()) {
    return invalid("post_processor TemplateProcessing: \"single\" must be a list and \"special_tokens\" an object");
  }
  bool text_seen = false;
  for (const json& piece : single) {
    const absl::Status status = read_template_piece(piece, special_tokens, vocab_size, text_seen, around);
    if (!status.ok()) return status;
  }
  return text_seen ? absl::OkStatus() : invalid("post_processor TemplateProcessing: \"single\" does not name the text");
}

// A string, or the "content" of a serialised AddedToken; empty otherwise.
std::string token_name(const json& value) {
  if (value.is_string()) return value.get<std::string>();
  return value.is_object() && value.value("content", json()).is_string() ? value["content"].get<std::string>() : "";
}

// A string, or a list of {name, template} of which "default" counts; empty otherwise.
std::string chat_template_of(const json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) return "";
  for (const json& entry : value) {
    if (entry.is_object() && entry.value("name", json()) == "default" && entry.value("template", json()).is_string()) {
      return entry["template"].get<std::string>();
    }
  }
  return "";
}

// NOT_FOUND when there is no such file.
absl::StatusOr<std::string> read_file(const std::filesystem::path& path) {
  std::error_code error;
  const auto bytes = std::filesystem::file_size(path, error);
  if (error == std::errc::no_such_file_or_directory || error == std::errc::not_a_directory) {
    return absl::NotFoundError(cat(path.string(), " does not exist"));
  }
  if (error) return absl::InvalidArgumentError(cat(path.string(), ": ", error.message()));
  if (bytes > static_cast<uint64_t>(kMaxTokenizerFileBytes)) {
    return absl::InvalidArgumentError(
        cat(path.string(), " has ", bytes, " bytes; the limit is ", kMaxTokenizerFileBytes));
  }
  std::ifstream file(path, std::ios::binary);
  std::string text(bytes, '\0');
  if (!file.read(text.data(), static_cast<std::streamsize>(bytes))) {
    return absl::InvalidArgumentError(cat(path.string(), " cannot be read"));
  }
  return text;
}

absl::Status in_directory(const std::string& directory, const absl::Status& status) {
  return absl::Status(status.code(), cat(directory, ": ", status.message()));
}

}  // namespace

struct Tokenizer::Parts {
  Parts(Bpe bpe, PreTokenizer pre_tokenizer) : bpe(std::move(bpe)), pre_tokenizer(std::move(pre_tokenizer)) {}

  Bpe bpe;
  PreTokenizer pre_tokenizer;
  AddedTokenFinder every_added_token;
  AddedTokenFinder plain_added_tokens;  // those that are not special: they count in any text
  absl::flat_hash_map<std::string, int32_t> special_ids;
  std::vector<bool> special;  // [vocab_size]
  Surroundings surroundings;
  std::optional<int32_t> bos_token_id;
  std::string chat_template;
};

absl::StatusOr<Tokenizer> Tokenizer::load(const std::string& model_directory) {
  const std::filesystem::path directory(model_directory);
  absl::StatusOr<std::string> tokenizer = read_file(directory / "tokenizer.json");
  std::error_code ignored;
  if (absl::IsNotFound(tokenizer.status()) && std::filesystem::exists(directory / "tokenizer.model", ignored)) {
    return absl::FailedPreconditionError(
        cat(model_directory,
            " has a tokenizer.model but no tokenizer.json: use the model's Hugging Face files, or "
            "write tokenizer.json with transformers' save_pretrained"));
  }
  if (!tokenizer.ok()) return tokenizer.status();
  absl::StatusOr<std::string> config = read_file(directory / "tokenizer_config.json");
  if (!config.ok() && !absl::IsNotFound(config.status())) return config.status();
  absl::StatusOr<std::string> chat_template = read_file(directory / "chat_template.jinja");
  if (!chat_template.ok() && !absl::IsNotFound(chat_template.status())) return chat_template.status();
  absl::StatusOr<Tokenizer> result =
      build(*tokenizer, config.ok() ? std::string_view(*config) : std::string_view(),
            chat_template.ok() ? std::optional<std::string>(*chat_template) : std::nullopt);
  return result.ok() ? result : in_directory(model_directory, result.status());
}

absl::StatusOr<Tokenizer> Tokenizer::parse(std::string_view tokenizer_json, std::string_view tokenizer_config_json) {
  return build(tokenizer_json, tokenizer_config_json, std::nullopt);
}

absl::StatusOr<Tokenizer> Tokenizer::build(std::string_view tokenizer_json, std::string_view tokenizer_config_json,
                                           std::optional<std::string> chat_template) {
  absl::StatusOr<TokenizerJson> file = read_tokenizer_json(tokenizer_json);
  if (!file.ok()) return file.status();
  if (const absl::Status status = check_kind(file->rest); !status.ok()) return status;
  if (file->vocabulary.empty()) return invalid("model.vocab is missing or empty");
  absl::StatusOr<PreTokenizer> pre_tokenizer = PreTokenizer::from_json(file->rest.value("pre_tokenizer", json()));
  if (!pre_tokenizer.ok()) return pre_tokenizer.status();

  absl::StatusOr<std::vector<AddedToken>> added = read_added_tokens(file->rest);
  if (!added.ok()) return added.status();
  TokenTable table;
  if (const absl::Status status = add_vocabulary(*file, table); !status.ok()) return status;
  if (const absl::Status status = add_added_tokens(*added, table); !status.ok()) return status;
  absl::StatusOr<Bpe> bpe = build_bpe(*file, table);
  if (!bpe.ok()) return bpe.status();

  auto parts = std::make_shared<Parts>(*std::move(bpe), *std::move(pre_tokenizer));
  for (const AddedToken& token : *added) {
    parts->every_added_token.add(token.content, token.id);
    if (token.special) {
      parts->special_ids.emplace(token.content, token.id);
    } else {
      parts->plain_added_tokens.add(token.content, token.id);
    }
  }
  parts->special = std::move(table.special);
  const absl::Status status = add_post_processor(file->rest.value("post_processor", json()),
                                                 parts->bpe.vocabulary().size(), parts->surroundings);
  if (!status.ok()) return status;

  json config = json::object();
  if (!tokenizer_config_json.empty()) {
    absl::StatusOr<json> read = read_small_json(tokenizer_config_json, "tokenizer_config.json");
    if (!read.ok()) return read.status();
    if (!read->is_object())
      return absl::InvalidArgumentError("tokenizer_config.json: the file must hold one JSON object");
    config = *std::move(read);
  }
  const auto bos = parts->special_ids.find(token_name(config.value("bos_token", json())));
  if (bos != parts->special_ids.end()) {
    parts->bos_token_id = bos->second;
  } else if (!parts->surroundings.before.empty()) {
    parts->bos_token_id = parts->surroundings.before.front();
  }
  parts->chat_template =
      chat_template.has_value() ? *std::move(chat_template) : chat_template_of(config.value("chat_template", json()));
  return Tokenizer(std::move(parts));
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special, bool parse_special) const {
  std::string repaired;
  if (!is_valid_utf8(text)) {
    repaired = to_valid_utf8(text);
    text = repaired;
  }
  std::vector<int32_t> ids;
  if (add_special) ids = parts_->surroundings.before;
  PreTokenizer::Scratch split_scratch;
  Bpe::Scratch merge_scratch;
  const AddedTokenFinder& added = parse_special ? parts_->every_added_token : parts_->plain_added_tokens;
  size_t at = 0;
  while (at < text.size()) {
    const AddedTokenFinder::Found found = added.find(text, at);
    const size_t end = found.bytes > 0 ? found.begin : text.size();
    parts_->pre_tokenizer.split(text.substr(at, end - at), split_scratch,
                                [&](std::string_view word) { parts_->bpe.encode(word, merge_scratch, ids); });
    if (found.bytes > 0) ids.push_back(found.id);
    at = end + found.bytes;
  }
  if (add_special) ids.insert(ids.end(), parts_->surroundings.after.begin(), parts_->surroundings.after.end());
  return ids;
}

std::string_view Tokenizer::bytes_of(int32_t id) const {
  return id >= 0 && id < vocab_size() ? parts_->bpe.vocabulary().bytes_of(id) : std::string_view();
}

bool Tokenizer::is_special(int32_t id) const { return id >= 0 && id < vocab_size() && parts_->special[id]; }

std::optional<int32_t> Tokenizer::special_id(std::string_view text) const {
  const auto found = parts_->special_ids.find(as_absl(text));
  return found == parts_->special_ids.end() ? std::nullopt : std::optional(found->second);
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string bytes;
  for (const int32_t id : ids) {
    if (!skip_special || !is_special(id)) bytes.append(bytes_of(id));
  }
  return to_valid_utf8(bytes);
}

int32_t Tokenizer::vocab_size() const { return parts_->bpe.vocabulary().size(); }
std::optional<int32_t> Tokenizer::bos_token_id() const { return parts_->bos_token_id; }
const std::string& Tokenizer::chat_template() const { return parts_->chat_template; }

}  // namespace octet
