// Reads a Jinja chat template far enough to say whether Octet's compiled-in formats mean the same: its words, its
// string literals and the text it prints between tags. It is not a template engine; nothing is ever run.
#pragma once

#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace octet {

struct TemplateContents {
  std::set<std::string> words;     // names, keywords, filters, attributes
  std::set<std::string> literals;  // string literals, escapes resolved; without `date`
  std::string printed;             // text between tags that would be printed as it stands
  std::string date;                // the literal of `set date_string = "..."`; empty when there is none
};

TemplateContents read_template(std::string_view source);

// Compared with what a format knows: the first part of the template that is not in `words` or `literals`, quoted; empty
// when every part is known.
std::string first_unknown(const TemplateContents& contents, const std::set<std::string>& words,
                          const std::set<std::string>& literals);

}  // namespace octet
