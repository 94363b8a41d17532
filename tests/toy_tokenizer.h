// A small byte-level tokenizer.json for tests: all 256 bytes as tokens 0..255, then one token per merge, then added
// tokens.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "coordinator/text/tokenizer.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace octet {

inline constexpr const char* kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

inline nlohmann::json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
}

inline nlohmann::json llama3_pre_tokenizer() {
  return {{"type", "Sequence"},
          {"pretokenizers",
           {{{"type", "Split"}, {"pattern", {{"Regex", kLlama3Pattern}}}, {"behavior", "Isolated"}, {"invert", false}},
            byte_level(false)}}};
}

inline nlohmann::json smollm2_pre_tokenizer() {
  return {{"type", "Sequence"},
          {"pretokenizers", {{{"type", "Digits"}, {"individual_digits", true}}, byte_level(true)}}};
}

// How the byte-level alphabet spells a byte.
inline std::string spell(std::string_view bytes) {
  std::string spelling;
  for (const char character : bytes) {
    const int byte = static_cast<unsigned char>(character);
    const auto printable = [](int b) { return (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE; };
    int code_point = byte;
    if (!printable(byte)) {
      code_point = 256;
      for (int b = 0; b < byte; ++b) code_point += printable(b) ? 0 : 1;
    }
    if (code_point < 0x80) {
      spelling.push_back(static_cast<char>(code_point));
    } else {
      spelling.push_back(static_cast<char>(0xC0 | code_point >> 6));
      spelling.push_back(static_cast<char>(0x80 | (code_point & 0x3F)));
    }
  }
  return spelling;
}

struct AddedToy {
  std::string content;
  bool special = true;
};

// Token ids: a byte is itself; merge i is 256 + i; added token i follows the merges.
inline nlohmann::json toy_tokenizer_json(const std::vector<std::pair<std::string, std::string>>& merges = {},
                                         const std::vector<AddedToy>& added = {},
                                         nlohmann::json pre_tokenizer = byte_level(true)) {
  nlohmann::json vocab = nlohmann::json::object();
  nlohmann::json merge_list = nlohmann::json::array();
  nlohmann::json added_list = nlohmann::json::array();
  int id = 0;
  for (; id < 256; ++id) vocab[spell(std::string(1, static_cast<char>(id)))] = id;
  for (const auto& [left, right] : merges) {
    vocab[spell(left + right)] = id++;
    merge_list.push_back(spell(left) + " " + spell(right));
  }
  for (const AddedToy& token : added) {
    added_list.push_back({{"id", id++},
                          {"content", token.content},
                          {"special", token.special},
                          {"normalized", false},
                          {"single_word", false},
                          {"lstrip", false},
                          {"rstrip", false}});
  }
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added_list},
          {"normalizer", nullptr},
          {"pre_tokenizer", std::move(pre_tokenizer)},
          {"post_processor", nullptr},
          {"decoder", byte_level(true)},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"ignore_merges", false},
            {"vocab", vocab},
            {"merges", merge_list}}}};
}

inline Tokenizer parse_or_die(const nlohmann::json& file, std::string_view config = {}) {
  absl::StatusOr<Tokenizer> tokenizer = Tokenizer::parse(file.dump(), config);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

}  // namespace octet
