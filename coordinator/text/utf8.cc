#include "coordinator/text/utf8.h"

#include <cstdint>
#include <cstring>

namespace octet {
namespace {

struct LeadByte {
  size_t length;  // of the whole character; 0 when no character starts so
  uint8_t low;    // range of the second byte, which is where overlongs, surrogates and > U+10FFFF show
  uint8_t high;
};

LeadByte lead_byte(uint8_t byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xC2) return {0, 0, 0};
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte < 0xF0) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

bool is_python_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

// Bytes of the last character of text, or 0 when text does not end with a whole one.
size_t last_character_bytes(std::string_view text) {
  for (size_t length = 1; length <= 4 && length <= text.size(); ++length) {
    const std::string_view tail = text.substr(text.size() - length);
    if ((static_cast<uint8_t>(tail[0]) & 0xC0) == 0x80) continue;
    const Utf8Step step = utf8_step(tail);
    return step.kind == Utf8Step::kCharacter && step.bytes == length ? length : 0;
  }
  return 0;
}

// Appends the text of bytes to out, broken parts replaced; returns how many bytes at the end are the incomplete
// beginning of a character, which is not appended.
size_t append_text(std::string_view bytes, std::string& out) {
  size_t at = 0;
  while (at < bytes.size()) {
    const Utf8Step step = utf8_step(bytes.substr(at));
    if (step.kind == Utf8Step::kIncomplete) return step.bytes;
    if (step.kind == Utf8Step::kCharacter) {
      out.append(bytes.substr(at, step.bytes));
    } else {
      out.append(kReplacementCharacter);
    }
    at += step.bytes;
  }
  return 0;
}

}  // namespace

Utf8Step utf8_step(std::string_view bytes) {
  const LeadByte lead = lead_byte(static_cast<uint8_t>(bytes[0]));
  if (lead.length == 0) return {Utf8Step::kIllFormed, 1};
  for (size_t i = 1; i < lead.length; ++i) {
    if (i == bytes.size()) return {Utf8Step::kIncomplete, i};
    const uint8_t byte = static_cast<uint8_t>(bytes[i]);
    const uint8_t low = i == 1 ? lead.low : 0x80;
    const uint8_t high = i == 1 ? lead.high : 0xBF;
    if (byte < low || byte > high) return {Utf8Step::kIllFormed, i};
  }
  return {Utf8Step::kCharacter, lead.length};
}

char32_t utf8_code_point(std::string_view bytes) {
  const auto byte = [&](size_t i) { return static_cast<char32_t>(static_cast<uint8_t>(bytes[i])); };
  if (byte(0) < 0x80) return byte(0);
  if (byte(0) < 0xE0) return (byte(0) & 0x1F) << 6 | (byte(1) & 0x3F);
  if (byte(0) < 0xF0) return (byte(0) & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
  return (byte(0) & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F);
}

bool is_valid_utf8(std::string_view bytes) {
  size_t at = 0;
  while (at < bytes.size()) {
    // Most text is ASCII: eight bytes at a time.
    uint64_t eight;
    if (at + sizeof(eight) <= bytes.size()) {
      std::memcpy(&eight, bytes.data() + at, sizeof(eight));
      if ((eight & 0x8080808080808080u) == 0) {
        at += sizeof(eight);
        continue;
      }
    }
    const Utf8Step step = utf8_step(bytes.substr(at));
    if (step.kind != Utf8Step::kCharacter) return false;
    at += step.bytes;
  }
  return true;
}

std::string to_valid_utf8(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size());
  if (append_text(bytes, text) > 0) text.append(kReplacementCharacter);
  return text;
}

std::string_view trim_as_python(std::string_view text) {
  while (!text.empty()) {
    const Utf8Step step = utf8_step(text);
    if (step.kind != Utf8Step::kCharacter || !is_python_space(utf8_code_point(text))) break;
    text.remove_prefix(step.bytes);
  }
  while (const size_t length = last_character_bytes(text)) {
    if (!is_python_space(utf8_code_point(text.substr(text.size() - length)))) break;
    text.remove_suffix(length);
  }
  return text;
}

std::string Utf8Stream::push(std::string_view bytes) {
  held_.append(bytes);
  std::string text;
  const size_t incomplete = append_text(held_, text);
  held_.erase(0, held_.size() - incomplete);
  return text;
}

std::string Utf8Stream::flush() {
  const bool incomplete = !held_.empty();
  held_.clear();
  return incomplete ? std::string(kReplacementCharacter) : std::string();
}

}  // namespace octet
