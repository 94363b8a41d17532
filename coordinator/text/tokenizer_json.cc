#include "coordinator/text/tokenizer_json.h"

#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "coordinator/text/cat.h"

namespace octet {
namespace {

using nlohmann::json;

// Values outside the vocabulary and the merges: real files have some thousands (added_tokens). Bounds memory.
constexpr int64_t kMaxValues = 1'000'000;

// Receives the file's events. Inside model.vocab and model.merges they fill the lists; elsewhere they build `rest`.
class TokenizerJsonReader : public json::json_sax_t {
 public:
  TokenizerJsonReader(std::string_view name, TokenizerJson* file) : name_(name), file_(file) {}

  absl::Status status() const { return status_; }

  bool null() override { return value(json(nullptr)); }
  bool boolean(bool flag) override { return value(json(flag)); }
  bool number_float(double number, const std::string&) override { return value(json(number)); }
  bool number_integer(int64_t number) override { return value(json(number)); }
  bool number_unsigned(uint64_t number) override {
    if (region_ == Region::kVocabulary && depth_ == kRegionDepth) return vocabulary_entry(number);
    return value(json(number));
  }
  bool string(std::string& text) override {
    if (region_ == Region::kMerges) return merge_text(text);
    return value(json(text));
  }
  bool binary(json::binary_t&) override { return fail("binary values are not JSON"); }

  bool start_object(size_t) override {
    if (!descend()) return false;
    if (region_ != Region::kRest) return fail("an object inside model.vocab or model.merges");
    if (at_model_member("vocab")) {
      region_ = Region::kVocabulary;
      return true;
    }
    return open(json::object());
  }
  bool key(std::string& key) override {
    keys_.back() = key;
    return true;
  }
  bool end_object() override { return close(); }

  bool start_array(size_t) override {
    if (!descend()) return false;
    if (region_ == Region::kMerges && depth_ == kRegionDepth + 1) {
      left_.reset();
      return true;
    }
    if (region_ != Region::kRest) return fail("an array inside model.vocab, or a nested one in model.merges");
    if (at_model_member("merges")) {
      region_ = Region::kMerges;
      return true;
    }
    return open(json::array());
  }
  bool end_array() override {
    if (region_ == Region::kMerges && depth_ == kRegionDepth + 1) {
      if (left_.has_value() || pair_done_ == false) return fail("a merge that is not a pair of tokens");
      pair_done_ = false;
      ascend();
      return true;
    }
    return close();
  }

  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
    return fail(cat("not valid JSON at byte ", position));
  }

 private:
  enum class Region { kRest, kVocabulary, kMerges };
  static constexpr int kRegionDepth = 3;  // the file's object, model, vocab or merges

  bool fail(std::string_view what) {
    if (status_.ok()) status_ = absl::InvalidArgumentError(cat(name_, ": ", what));
    return false;
  }

  bool descend() {
    if (++depth_ > kMaxJsonDepth) return fail(cat("nested deeper than ", kMaxJsonDepth, " levels"));
    keys_.emplace_back();
    return true;
  }
  void ascend() {
    --depth_;
    keys_.pop_back();
  }

  // Called after descend(): is the value that just opened model.<member>?
  bool at_model_member(std::string_view member) const {
    return file_ != nullptr && depth_ == kRegionDepth && keys_[0] == "model" && keys_[1] == member;
  }

  bool value(json item) {
    if (region_ == Region::kVocabulary) {
      return fail(cat("the id of token '", keys_.back(), "' is not a whole number of at least 0"));
    }
    if (region_ == Region::kMerges) return fail("a merge that is neither a string nor a pair of strings");
    return add(std::move(item)) != nullptr;
  }

  json* add(json item) {
    if (++values_ > kMaxValues) {
      fail(cat("more than ", kMaxValues, " values"));
      return nullptr;
    }
    if (open_.empty()) {
      root_ = std::move(item);
      return &root_;
    }
    json& parent = *open_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(item));
      return &parent.back();
    }
    const auto [place, is_new] = parent.emplace(keys_[depth_of_parent()], std::move(item));
    if (!is_new) {
      fail(cat("key '", place.key(), "' appears twice"));
      return nullptr;
    }
    return &place.value();
  }
  // A container has already descended when it is added; a plain value has not.
  size_t depth_of_parent() const { return open_.size() - 1; }

  bool open(json container) {
    json* place = add(std::move(container));
    if (place == nullptr) return false;
    open_.push_back(place);
    return true;
  }
  bool close() {
    if (region_ != Region::kRest) {
      region_ = Region::kRest;
    } else {
      open_.pop_back();
      if (open_.empty() && file_ != nullptr) file_->rest = std::move(root_);
    }
    ascend();
    return true;
  }

  TextSpan keep(std::string_view text) {
    const TextSpan span{static_cast<uint32_t>(file_->text.size()), static_cast<uint32_t>(text.size())};
    file_->text.append(text);
    return span;
  }

  bool vocabulary_entry(uint64_t id) {
    if (id >= static_cast<uint64_t>(kMaxVocabularySize)) {
      return fail(cat("token '", keys_.back(), "' has id ", id, "; ids must be below ", kMaxVocabularySize));
    }
    file_->vocabulary.push_back({keep(keys_.back()), static_cast<int32_t>(id)});
    return true;
  }

  bool merge_text(const std::string& text) {
    if (depth_ == kRegionDepth) {
      const size_t space = text.find(' ');
      if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
        return fail(cat("merge '", text, "' is not two tokens with one space between them"));
      }
      const std::string_view view = text;
      const TextSpan left = keep(view.substr(0, space));
      file_->merges.push_back({left, keep(view.substr(space + 1))});
      return true;
    }
    if (pair_done_) return fail("a merge of more than two tokens");
    if (!left_.has_value()) {
      left_ = keep(text);
      return true;
    }
    file_->merges.push_back({*left_, keep(text)});
    left_.reset();
    pair_done_ = true;
    return true;
  }

  std::string name_;
  TokenizerJson* file_;  // null: everything goes to the plain value
  absl::Status status_;
  int depth_ = 0;
  int64_t values_ = 0;
  std::vector<std::string> keys_;  // one per open container: the key at which it stands now
  std::vector<json*> open_;
  json root_;
  Region region_ = Region::kRest;
  std::optional<TextSpan> left_;  // of a merge pair whose right side has not come yet
  bool pair_done_ = false;

 public:
  json take_root() { return std::move(root_); }
};

}  // namespace

absl::StatusOr<TokenizerJson> read_tokenizer_json(std::string_view json_text) {
  if (static_cast<int64_t>(json_text.size()) > kMaxTokenizerFileBytes) {
    return absl::InvalidArgumentError(
        cat("tokenizer.json has ", json_text.size(), " bytes; the limit is ", kMaxTokenizerFileBytes));
  }
  TokenizerJson file;
  file.text.reserve(json_text.size() / 2);
  TokenizerJsonReader reader("tokenizer.json", &file);
  json::sax_parse(json_text, &reader);
  if (!reader.status().ok()) return reader.status();
  if (!file.rest.is_object()) return absl::InvalidArgumentError("tokenizer.json: the file must hold one JSON object");
  file.text.shrink_to_fit();
  return file;
}

absl::StatusOr<nlohmann::json> read_small_json(std::string_view json_text, std::string_view name) {
  if (static_cast<int64_t>(json_text.size()) > kMaxTokenizerFileBytes) {
    return absl::InvalidArgumentError(
        cat(name, " has ", json_text.size(), " bytes; the limit is ", kMaxTokenizerFileBytes));
  }
  TokenizerJsonReader reader(name, nullptr);
  json::sax_parse(json_text, &reader);
  if (!reader.status().ok()) return reader.status();
  return reader.take_root();
}

}  // namespace octet
