// Chat templates for tests, and a small tokenizer that has all their special tokens.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "tests/toy_tokenizer.h"

namespace octet {

// Templates that have the words of the real ones but are none: only what recognition looks at.
inline constexpr const char* kToyLlama31 = R"({{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{#- a comment may say anything: {{ "unknown" }} #}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- "Given the following functions, please respond with a JSON for a function call " }}
{%- for t in tools %}
    {{- t | tojson(indent=4) }}
{%- endfor %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
)";
inline constexpr const char* kToyChatMl =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor "
    "%}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

inline Tokenizer toy(const std::string& chat_template,
                     std::vector<std::string> specials = {"<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                                                          "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
                                                          "<|python_tag|>", "<|im_start|>", "<|im_end|>"}) {
  std::vector<AddedToy> added;
  for (std::string& name : specials) added.push_back({std::move(name), true});
  return parse_or_die(toy_tokenizer_json({}, added),
                      nlohmann::json{{"chat_template", chat_template}, {"bos_token", "<|begin_of_text|>"}}.dump());
}

}  // namespace octet
