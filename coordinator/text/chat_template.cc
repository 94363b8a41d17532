#include "coordinator/text/chat_template.h"

#include <algorithm>
#include <cctype>

#include "coordinator/text/cat.h"
#include "coordinator/text/chat_json.h"

namespace octet {
namespace {

constexpr std::string_view kSpace = " \t\n\r\f\v";

// One {{ }}, {% %} or {# #}.
struct Tag {
  size_t begin = std::string_view::npos;
  size_t end = std::string_view::npos;
  char kind = 0;  // '{', '%' or '#'
  std::string_view inside;
  bool trims_before = false;
  bool trims_after = false;
};

// Where the tag that opened at `begin` closes: string literals may hold the closing mark.
size_t closing(std::string_view source, size_t begin, std::string_view mark, bool comment) {
  char quote = 0;
  for (size_t at = begin; at < source.size(); ++at) {
    if (quote != 0) {
      if (source[at] == '\\') {
        ++at;
      } else if (source[at] == quote) {
        quote = 0;
      }
    } else if (source.substr(at).starts_with(mark)) {
      return at;
    } else if (!comment && (source[at] == '"' || source[at] == '\'')) {
      quote = source[at];
    }
  }
  return std::string_view::npos;
}

Tag next_tag(std::string_view source, size_t at) {
  Tag tag;
  for (tag.begin = source.find('{', at); tag.begin != std::string_view::npos;
       tag.begin = source.find('{', tag.begin + 1)) {
    const std::string_view kind = source.substr(tag.begin + 1, 1);
    if (kind == "{" || kind == "%" || kind == "#") break;
  }
  if (tag.begin == std::string_view::npos) return tag;
  tag.kind = source[tag.begin + 1];
  const std::string mark = tag.kind == '{' ? "}}" : cat(std::string(1, tag.kind), "}");
  const size_t close = closing(source, tag.begin + 2, mark, tag.kind == '#');
  tag.end = close == std::string_view::npos ? source.size() : close + 2;
  tag.inside = source.substr(tag.begin + 2, (close == std::string_view::npos ? source.size() : close) - tag.begin - 2);
  tag.trims_before = consume_prefix(tag.inside, "-");
  tag.trims_after = consume_suffix(tag.inside, "-");
  return tag;
}

// What is printed of the text between two tags, under the settings that transformers uses (trim_blocks, lstrip_blocks).
std::string_view printed_text(std::string_view text, const Tag& before, const Tag& after) {
  if (before.trims_after) {
    text = text.substr(std::min(text.find_first_not_of(kSpace), text.size()));
  } else if (before.kind == '%' || before.kind == '#') {
    consume_prefix(text, "\n");
  }
  if (after.trims_before) return text.substr(0, text.find_last_not_of(kSpace) + 1);
  if (after.kind == '%' || after.kind == '#') {
    const size_t last = text.find_last_not_of(" \t");
    const bool line_start = last == std::string_view::npos || text[last] == '\n';
    if (line_start) text = text.substr(0, last == std::string_view::npos ? 0 : last + 1);
  }
  return text;
}

// Reads the words and literals inside one tag.
class TagReader {
 public:
  TagReader(std::string_view inside, TemplateContents& contents) : inside_(inside), contents_(contents) {}

  void run() {
    while (at_ < inside_.size()) {
      const char c = inside_[at_];
      if (c == '"' || c == '\'') {
        literal(c);
      } else if (std::isalpha(static_cast<unsigned char>(c)) || c == '_') {
        word();
      } else {
        assigns_date_ = (assigns_date_ && (c == ' ' || c == '=')) || (last_word_ == "date_string" && c == '=');
        if (c != ' ' && c != '=') last_word_.clear();
        ++at_;
      }
    }
  }

 private:
  void word() {
    const size_t begin = at_;
    while (at_ < inside_.size() && (std::isalnum(static_cast<unsigned char>(inside_[at_])) || inside_[at_] == '_'))
      ++at_;
    last_word_ = std::string(inside_.substr(begin, at_ - begin));
    assigns_date_ = false;
    contents_.words.insert(last_word_);
  }

  void literal(char quote) {
    std::string text;
    for (++at_; at_ < inside_.size() && inside_[at_] != quote; ++at_) {
      if (inside_[at_] == '\\' && at_ + 1 < inside_.size()) {
        const char escaped = inside_[++at_];
        text.push_back(escaped == 'n' ? '\n' : escaped == 't' ? '\t' : escaped == 'r' ? '\r' : escaped);
      } else {
        text.push_back(inside_[at_]);
      }
    }
    ++at_;
    if (assigns_date_) {
      contents_.date = text;
    } else {
      contents_.literals.insert(text);
    }
    assigns_date_ = false;
    last_word_.clear();
  }

  std::string_view inside_;
  TemplateContents& contents_;
  size_t at_ = 0;
  std::string last_word_;
  bool assigns_date_ = false;  // between `date_string =` and what follows
};

}  // namespace

TemplateContents read_template(std::string_view source) {
  consume_suffix(source, "\n");  // Jinja drops one newline at the end of a template
  TemplateContents contents;
  Tag before;
  size_t at = 0;
  while (true) {
    const Tag tag = next_tag(source, at);
    contents.printed.append(printed_text(source.substr(at, std::min(tag.begin, source.size()) - at), before, tag));
    if (tag.begin == std::string_view::npos) return contents;
    if (tag.kind != '#') TagReader(tag.inside, contents).run();
    before = tag;
    at = tag.end;
  }
}

std::string first_unknown(const TemplateContents& contents, const std::set<std::string>& words,
                          const std::set<std::string>& literals) {
  for (const std::string& literal : contents.literals) {
    if (!literals.contains(literal)) return cat("the text ", json_string_as_python(literal));
  }
  for (const std::string& word : contents.words) {
    if (!words.contains(word)) return cat("the word '", word, "'");
  }
  return contents.printed.empty() ? "" : cat("the text ", json_string_as_python(contents.printed), " between tags");
}

}  // namespace octet
