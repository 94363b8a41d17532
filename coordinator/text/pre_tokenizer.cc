#include "coordinator/text/pre_tokenizer.h"

#include <cctype>

#include "coordinator/text/cat.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace octet {
namespace {

using nlohmann::json;

// GPT-2's, which ByteLevel means by use_regex.
constexpr std::string_view kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// Unicode White_Space. PCRE2's own \s also matches U+180E, which lost that property in Unicode 6.3.
constexpr std::string_view kWhiteSpace =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

// A real pattern takes a few steps per byte of a run; these allow that many times over on any input a request may
// carry.
constexpr uint32_t kMatchLimit = 100'000'000;
constexpr uint32_t kHeapLimitKilobytes = 64 << 10;
constexpr size_t kJitStackStart = 32 << 10;
constexpr size_t kJitStackLimit = 1 << 20;

absl::Status refuse(std::string_view pattern, std::string_view what) {
  return absl::InvalidArgumentError(
      cat("pre_tokenizer: the pattern '", pattern, "' uses ", what, ", which Octet does not support"));
}

// Copies a pattern while rewriting \s and \S, and stops at what Oniguruma and PCRE2 read differently.
class PatternRewriter {
 public:
  explicit PatternRewriter(std::string_view pattern) : pattern_(pattern) {}

  absl::StatusOr<std::string> run() {
    while (at_ < pattern_.size()) {
      const absl::Status status = pattern_[at_] == '\\' ? escape() : in_class_ ? class_character() : character();
      if (!status.ok()) return status;
    }
    return out_;
  }

 private:
  std::string_view ahead() const { return pattern_.substr(at_); }
  void copy(size_t bytes) {
    out_.append(pattern_.substr(at_, bytes));
    at_ += bytes;
  }

  absl::Status escape() {
    if (at_ + 1 == pattern_.size()) return refuse(pattern_, "a lone backslash at its end");
    const char name = pattern_[at_ + 1];
    if (name == 's' || name == 'S') return white_space(name);
    if (name == 'p' || name == 'P') return property();
    const bool same_in_both = std::string_view("rntdD").find(name) != std::string_view::npos;
    if (std::isalnum(static_cast<unsigned char>(name)) && !same_in_both) {
      return refuse(pattern_, cat("the escape \\", std::string(1, name)));
    }
    copy(2);
    return absl::OkStatus();
  }

  absl::Status white_space(char name) {
    if (in_class_ && name == 'S') return refuse(pattern_, "\\S inside a character class");
    if (in_class_) {
      out_.append(kWhiteSpace);
    } else {
      append(out_, name == 's' ? "[" : "[^", kWhiteSpace, "]");
    }
    at_ += 2;
    return absl::OkStatus();
  }

  // \p{L}, \p{Lu}: general categories mean the same in both; script names do not.
  absl::Status property() {
    const size_t close = pattern_.find('}', at_);
    const size_t length = close == std::string_view::npos ? 0 : close - at_ - 3;
    if (pattern_.substr(at_ + 2, 1) != "{" || length < 1 || length > 2 ||
        std::string_view("LMNPSZC").find(pattern_[at_ + 3]) == std::string_view::npos) {
      return refuse(pattern_, "a property that is not a general category such as \\p{L}");
    }
    copy(close + 1 - at_);
    return absl::OkStatus();
  }

  absl::Status class_character() {
    if (pattern_[at_] == '[' || ahead().substr(0, 2) == "&&") return refuse(pattern_, "a nested character class");
    in_class_ = pattern_[at_] != ']';
    copy(1);
    return absl::OkStatus();
  }

  absl::Status character() {
    if (pattern_[at_] == '^' || pattern_[at_] == '$') return refuse(pattern_, "an anchor");
    if (ahead().substr(0, 2) == "(*") return refuse(pattern_, "a verb");
    if (ahead().substr(0, 2) == "}+") return refuse(pattern_, "a possessive interval");
    if (ahead().substr(0, 2) == "(?") {
      for (const std::string_view group : {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"}) {
        if (ahead().substr(0, group.size()) != group) continue;
        copy(group.size());
        return absl::OkStatus();
      }
      return refuse(pattern_, "a group of a kind other than (?: (?i: (?= (?! (?<= (?<! (?>");
    }
    if (pattern_[at_] == '[') {
      in_class_ = true;
      copy(ahead().substr(1, 1) == "^" ? 2 : 1);
      if (ahead().substr(0, 1) == "]") return refuse(pattern_, "a character class that begins with ]");
      return absl::OkStatus();
    }
    copy(1);
    return absl::OkStatus();
  }

  std::string_view pattern_;
  std::string out_;
  size_t at_ = 0;
  bool in_class_ = false;
};

// The value of an optional boolean member; `fallback` when absent or null.
absl::StatusOr<bool> flag(const json& config, const char* name, bool fallback) {
  const auto member = config.find(name);
  if (member == config.end() || member->is_null()) return fallback;
  if (!member->is_boolean()) return absl::InvalidArgumentError(cat("pre_tokenizer: ", name, " is not a boolean"));
  return member->get<bool>();
}

absl::StatusOr<std::string> type_of(const json& config) {
  if (!config.is_object() || !config.contains("type") || !config["type"].is_string()) {
    return absl::InvalidArgumentError("pre_tokenizer: an object with a \"type\" string is needed");
  }
  return config["type"].get<std::string>();
}

absl::StatusOr<std::string> split_pattern(const json& config) {
  const auto pattern = config.find("pattern");
  if (pattern == config.end() || !pattern->is_object() || !pattern->contains("Regex") ||
      !(*pattern)["Regex"].is_string()) {
    return absl::UnimplementedError(
        "pre_tokenizer Split: only a pattern of the form {\"Regex\": \"...\"} is supported");
  }
  if (config.value("behavior", json("")) != "Isolated") {
    return absl::UnimplementedError(cat("pre_tokenizer Split: behavior ", config.value("behavior", json()).dump(),
                                        " is not supported, only \"Isolated\""));
  }
  const absl::StatusOr<bool> invert = flag(config, "invert", false);
  if (!invert.ok()) return invert.status();
  if (*invert) return absl::UnimplementedError("pre_tokenizer Split: invert true is not supported");
  return (*pattern)["Regex"].get<std::string>();
}

}  // namespace

struct PreTokenizer::Scratch::Memory {
  pcre2_match_data* match = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(kJitStackStart, kJitStackLimit, nullptr);

  Memory() {
    pcre2_set_match_limit(context, kMatchLimit);
    pcre2_set_heap_limit(context, kHeapLimitKilobytes);
    pcre2_jit_stack_assign(context, nullptr, stack);
  }
  ~Memory() {
    pcre2_match_data_free(match);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
};

PreTokenizer::Scratch::Scratch() : memory_(std::make_unique<Memory>()) {}
PreTokenizer::Scratch::~Scratch() = default;

absl::StatusOr<std::string> rewrite_pattern(std::string_view pattern) { return PatternRewriter(pattern).run(); }

absl::StatusOr<Regex> Regex::compile(std::string_view pattern) {
  const absl::StatusOr<std::string> rewritten = rewrite_pattern(pattern);
  if (!rewritten.ok()) return rewritten.status();
  int error = 0;
  size_t position = 0;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(rewritten->data()), rewritten->size(),
                                   PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &position, nullptr);
  if (code == nullptr) {
    PCRE2_UCHAR message[256];
    pcre2_get_error_message(error, message, sizeof(message));
    return absl::InvalidArgumentError(
        cat("pre_tokenizer: the pattern '", pattern, "' does not compile: ", reinterpret_cast<const char*>(message)));
  }
  // Where the system forbids making code at run time this fails, and matching is interpreted: slower, same result.
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  Regex regex;
  regex.code_ = std::shared_ptr<const void>(
      code, [](const void* p) { pcre2_code_free(static_cast<pcre2_code*>(const_cast<void*>(p))); });
  return regex;
}

absl::Status PreTokenizer::add_pattern(std::string_view pattern) {
  absl::StatusOr<Regex> regex = Regex::compile(pattern);
  if (!regex.ok()) return regex.status();
  steps_.push_back(*std::move(regex));
  return absl::OkStatus();
}

absl::Status PreTokenizer::add_step(const json& config) {
  const absl::StatusOr<std::string> type = type_of(config);
  if (!type.ok()) return type.status();
  if (*type == "Digits") {
    const absl::StatusOr<bool> individual = flag(config, "individual_digits", false);
    if (!individual.ok()) return individual.status();
    return add_pattern(*individual ? R"(\p{N})" : R"(\p{N}+)");
  }
  if (*type == "Split") {
    const absl::StatusOr<std::string> pattern = split_pattern(config);
    return pattern.ok() ? add_pattern(*pattern) : pattern.status();
  }
  if (*type == "ByteLevel") {
    const absl::StatusOr<bool> prefix = flag(config, "add_prefix_space", true);
    if (!prefix.ok()) return prefix.status();
    if (*prefix) return absl::UnimplementedError("pre_tokenizer ByteLevel: add_prefix_space true is not supported");
    const absl::StatusOr<bool> use_regex = flag(config, "use_regex", true);
    if (!use_regex.ok()) return use_regex.status();
    return *use_regex ? add_pattern(kByteLevelPattern) : absl::OkStatus();
  }
  return absl::UnimplementedError(cat("pre_tokenizer '", *type,
                                      "' is not supported; supported are ByteLevel, Digits and Split, alone or in a "
                                      "Sequence that ends with ByteLevel"));
}

absl::StatusOr<PreTokenizer> PreTokenizer::from_json(const json& config) {
  const absl::StatusOr<std::string> type = type_of(config);
  if (!type.ok()) return type.status();
  json steps = json::array({config});
  if (*type == "Sequence") {
    const auto parts = config.find("pretokenizers");
    if (parts == config.end() || !parts->is_array() || parts->empty()) {
      return absl::InvalidArgumentError("pre_tokenizer Sequence: \"pretokenizers\" must be a list that is not empty");
    }
    steps = *parts;
  }
  PreTokenizer result;
  for (const json& step : steps) {
    const absl::Status status = result.add_step(step);
    if (!status.ok()) return status;
  }
  // Only ByteLevel maps text to the byte alphabet that the vocabulary is spelled in, and it does so for good.
  for (size_t i = 0; i < steps.size(); ++i) {
    if ((steps[i]["type"] == "ByteLevel") != (i + 1 == steps.size())) {
      return absl::UnimplementedError("pre_tokenizer: ByteLevel must be the last step, and only the last");
    }
  }
  return result;
}

void PreTokenizer::split(std::string_view text, Scratch& scratch,
                         absl::FunctionRef<void(std::string_view)> piece) const {
  if (!text.empty()) split_from(0, text, scratch, piece);
}

void PreTokenizer::split_from(size_t step, std::string_view text, Scratch& scratch,
                              absl::FunctionRef<void(std::string_view)> piece) const {
  if (step == steps_.size()) return piece(text);
  const pcre2_code* code = static_cast<const pcre2_code*>(steps_[step].code());
  const PCRE2_SPTR subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const auto match_from = [&](size_t at) {
    return pcre2_match(code, subject, text.size(), at, PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY, scratch.memory_->match,
                       scratch.memory_->context);
  };
  size_t at = 0;
  while (at < text.size()) {
    const int found = match_from(at);
    const size_t* span = pcre2_get_ovector_pointer(scratch.memory_->match);
    const size_t begin = found >= 0 ? span[0] : text.size();
    const size_t end = found >= 0 ? span[1] : text.size();
    if (begin > at) split_from(step + 1, text.substr(at, begin - at), scratch, piece);
    if (end > begin) split_from(step + 1, text.substr(begin, end - begin), scratch, piece);
    at = end;
  }
}

}  // namespace octet
