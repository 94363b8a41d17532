#include "worker/checkpoint/safetensors.h"

#include <random>

#include "gtest/gtest.h"
#include "tests/checkpoint_files.h"

namespace octet {
namespace {

using testing::bytes_of;
using testing::read_file;
using testing::refuses;
using testing::safetensors_bytes;
using testing::TempDirectory;
using testing::write_file;

absl::StatusOr<SafetensorsHeader> header_of(const std::string& file_bytes) {
  TempDirectory directory;
  write_file(directory.path("x.safetensors"), file_bytes);
  absl::StatusOr<ReadFile> file = ReadFile::open(directory.path("x.safetensors"));
  if (!file.ok()) return file.status();
  return read_safetensors_header(*file);
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape, int64_t begin,
                  int64_t end) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":[" +
         std::to_string(begin) + "," + std::to_string(end) + "]}";
}

TEST(Safetensors, ReadsWhatTheFormatAllows) {
  const std::string header =
      "{\"__metadata__\":{\"format\":\"pt\",\"x\":\"y\"}," + entry("b", "BF16", "[2,3]", 4, 16) + "," +
      entry("a", "F32", "[]", 0, 4) + "," + entry("empty", "F32", "[0,7]", 16, 16) + "," +
      entry("odd", "F8_E5M2", "[3]", 16, 19) + "," + entry("new", "F3_X", "[9]", 19, 21) + "," +
      "\"more\":{\"later\":[{\"deep\":[[1.5]]}],\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[21,22]}}   ";
  absl::StatusOr<SafetensorsHeader> parsed = header_of(safetensors_bytes(header, std::string(22, 'x')));
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->metadata, (std::map<std::string, std::string>{{"format", "pt"}, {"x", "y"}}));
  ASSERT_EQ(parsed->tensors.size(), 6u);
  const int64_t data = 8 + static_cast<int64_t>(header.size());
  EXPECT_EQ(parsed->tensors[0].name, "a");
  EXPECT_EQ(parsed->tensors[0].offset, data);
  EXPECT_TRUE(parsed->tensors[0].shape.empty());
  EXPECT_EQ(parsed->tensors[1].name, "b");
  EXPECT_EQ(parsed->tensors[1].offset, data + 4);
  EXPECT_EQ(parsed->tensors[1].bytes, 12);
  EXPECT_EQ(parsed->tensors[1].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(dtype_named(parsed->tensors[1].dtype), DType::kBF16);
  EXPECT_EQ(dtype_named("F8_E5M2"), std::nullopt);
  EXPECT_TRUE(header_of(safetensors_bytes("{}", "")).ok());
}

TEST(Safetensors, RefusesBrokenHeaders) {
  const std::string a = entry("a", "F32", "[2]", 0, 8);
  const struct {
    const char* what;
    std::string file;
    std::vector<std::string> words;
  } cases[] = {
      {"an empty file", "", {"only 0 bytes"}},
      {"seven bytes", "1234567", {"only 7 bytes"}},
      {"a length beyond the file", std::string("\x10\0\0\0\0\0\0\0{}", 10), {"claims 16 bytes"}},
      {"a huge length", std::string("\xff\xff\xff\xff\xff\xff\xff\x7f{}", 10), {"claims", "100000000"}},
      {"the largest length", std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10), {"claims 18446744073709551615"}},
      {"no header", safetensors_bytes("", ""), {"begin with '{'"}},
      {"a leading space", safetensors_bytes(" {}", ""), {"begin with '{'"}},
      {"an array", safetensors_bytes("[]", ""), {"begin with '{'"}},
      {"cut JSON", safetensors_bytes("{\"a\":", ""), {"not valid JSON"}},
      {"two documents", safetensors_bytes("{}{}", ""), {"not valid JSON"}},
      {"invalid UTF-8", safetensors_bytes("{\"\xc3\":1}", ""), {"not valid JSON"}},
      {"a name twice", safetensors_bytes("{" + a + "," + a + "}", std::string(8, 'x')), {"\"a\"", "twice"}},
      {"a field twice", safetensors_bytes("{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\"}}", ""), {"\"dtype\"", "twice"}},
      {"a gap at the start",
       safetensors_bytes("{" + entry("a", "F32", "[1]", 4, 8) + "}", std::string(8, 'x')),
       {"begins at 4"}},
      {"a hole",
       safetensors_bytes("{" + a + "," + entry("b", "U8", "[1]", 9, 10) + "}", std::string(10, 'x')),
       {"tensor b", "begins at 9"}},
      {"an overlap",
       safetensors_bytes("{" + a + "," + entry("b", "U8", "[4]", 4, 8) + "}", std::string(8, 'x')),
       {"tensor b", "begins at 4"}},
      {"two tensors in one place",
       safetensors_bytes("{" + a + "," + entry("b", "F32", "[2]", 0, 8) + "}", std::string(8, 'x')),
       {"begins at 0"}},
      {"trailing bytes", safetensors_bytes("{" + a + "}", std::string(9, 'x')), {"1 bytes after the last tensor"}},
      {"missing data", safetensors_bytes("{" + a + "}", std::string(7, 'x')), {"tensor a", "holds 7 bytes"}},
      {"an end before its begin",
       safetensors_bytes("{" + a + "," + entry("b", "U8", "[0]", 8, 7) + "}", std::string(8, 'x')),
       {"tensor b", "before its begin"}},
      {"too few bytes for the shape",
       safetensors_bytes("{" + entry("a", "F32", "[3]", 0, 8) + "}", std::string(8, 'x')),
       {"tensor a", "[3]", "8 bytes"}},
      {"a shape whose product wraps",
       safetensors_bytes("{" + entry("a", "F32", "[4294967296,4294967296,4]", 0, 0) + "}", ""),
       {"tensor a", "4294967296"}},
      {"half a byte", safetensors_bytes("{" + entry("a", "F4", "[3]", 0, 1) + "}", "x"), {"tensor a", "F4"}},
      {"a negative dimension",
       safetensors_bytes("{" + entry("a", "U8", "[-1]", 0, 0) + "}", ""),
       {"tensor a", "shape", "integers"}},
      {"a fractional dimension",
       safetensors_bytes("{" + entry("a", "U8", "[1.0]", 0, 1) + "}", "x"),
       {"shape", "integers"}},
      {"a dimension beyond int64",
       safetensors_bytes("{" + entry("a", "U8", "[9223372036854775808]", 0, 0) + "}", ""),
       {"shape", "too large"}},
      {"a dimension beyond uint64",
       safetensors_bytes("{" + entry("a", "U8", "[99999999999999999999]", 0, 0) + "}", ""),
       {"shape", "integers"}},
      {"a nested shape", safetensors_bytes("{" + entry("a", "U8", "[[1]]", 0, 1) + "}", "x"), {"shape", "integers"}},
      {"a shape that is a string",
       safetensors_bytes("{" + entry("a", "U8", "\"1\"", 0, 1) + "}", "x"),
       {"shape", "integers"}},
      {"a shape that is an object",
       safetensors_bytes("{" + entry("a", "U8", "{}", 0, 1) + "}", "x"),
       {"shape", "integers"}},
      {"33 dimensions",
       safetensors_bytes("{" +
                             entry(
                                 "a", "U8",
                                 "[1" +
                                     [] {
                                       std::string s;
                                       for (int i = 0; i < 32; ++i) s += ",1";
                                       return s;
                                     }() +
                                     "]",
                                 0, 1) +
                             "}",
                         "x"),
       {"shape", "32"}},
      {"three offsets",
       safetensors_bytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}})", "x"),
       {"data_offsets", "2"}},
      {"one offset", safetensors_bytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", "x"), {"lacks"}},
      {"no dtype", safetensors_bytes(R"({"a":{"shape":[1],"data_offsets":[0,1]}})", "x"), {"lacks dtype"}},
      {"a dtype that is a number",
       safetensors_bytes(R"({"a":{"dtype":1,"shape":[1],"data_offsets":[0,1]}})", "x"),
       {"dtype", "string"}},
      {"no shape", safetensors_bytes(R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", "x"), {"lacks dtype, shape"}},
      {"an entry that is no object", safetensors_bytes(R"({"a":[1]})", ""), {"tensor a", "not an object"}},
      {"an entry that is a number", safetensors_bytes(R"({"a":1})", ""), {"tensor a", "not an object"}},
      {"metadata with a number", safetensors_bytes(R"({"__metadata__":{"a":1}})", ""), {"__metadata__", "strings"}},
      {"metadata with an object", safetensors_bytes(R"({"__metadata__":{"a":{}}})", ""), {"__metadata__", "strings"}},
      {"metadata that is a list", safetensors_bytes(R"({"__metadata__":[]})", ""), {"not an object"}},
      {"a very long name",
       safetensors_bytes("{" + entry(std::string(5000, 'n'), "U8", "[1]", 0, 1) + "}", "x"),
       {"name", "4096"}},
      {"deep nesting", safetensors_bytes("{\"a\":{\"x\":" + std::string(10000, '['), ""), {"nested deeper"}},
  };
  for (const auto& c : cases) EXPECT_TRUE(refuses(header_of(c.file).status(), c.words)) << c.what;
}

TEST(Safetensors, WritesWhatItReads) {
  TempDirectory directory;
  const std::string path = directory.path("y.safetensors");
  const std::vector<float> scale = {1.5f, 2.5f, 3.5f};
  const std::string codes = "abcdefghijklmno";
  absl::StatusOr<SafetensorsWriter> writer = SafetensorsWriter::create(
      path, {{"w", DType::kF8E4M3, {3, 5}}, {"w_scale", DType::kF32, {3, 1}}, {"one", DType::kBF16, {}}},
      {{"format", "pt"}});
  ASSERT_TRUE(writer.ok()) << writer.status();
  EXPECT_EQ(writer->tensor_bytes(), 15 + 12 + 2);
  // Out of order and in parts, as a converter that learns a scale from the whole tensor does.
  ASSERT_TRUE(writer->write(0, 5, codes.substr(5)).ok());
  ASSERT_TRUE(writer->write(0, 0, codes.substr(0, 5)).ok());
  ASSERT_TRUE(writer->write(2, 0, "\x80\x3f").ok());
  ASSERT_TRUE(writer->write(1, 0, bytes_of(scale)).ok());
  ASSERT_TRUE(writer->finish().ok());

  absl::StatusOr<SafetensorsHeader> header = header_of(read_file(path));
  ASSERT_TRUE(header.ok()) << header.status();
  EXPECT_EQ(header->header_bytes % 8, 0);
  const std::string bytes = read_file(path);
  std::map<std::string, std::string> data;
  for (const SafetensorsEntry& tensor : header->tensors) {
    EXPECT_EQ(tensor.offset % size_of(*dtype_named(tensor.dtype)), 0) << tensor.name;
    data[tensor.name] = bytes.substr(static_cast<size_t>(tensor.offset), static_cast<size_t>(tensor.bytes));
  }
  EXPECT_EQ(data["w"], codes);
  EXPECT_EQ(data["w_scale"], bytes_of(scale));
  EXPECT_EQ(data["one"], "\x80\x3f");
  EXPECT_TRUE(refuses(SafetensorsWriter::create(path, {}, {}).status(), {"cannot create", "y.safetensors"}));
}

// Whatever bytes of a valid file change: an answer, never a crash. Most mutants must be refused, or the rules are
// asleep.
TEST(Safetensors, SurvivesThousandsOfMutants) {
  const std::string valid = safetensors_bytes(
      "{\"__metadata__\":{\"format\":\"pt\"}," + entry("a.weight", "BF16", "[2,3]", 0, 12) + "," +
          entry("b.weight", "F8_E4M3", "[4]", 12, 16) + "," + entry("b.scale", "F32", "[]", 16, 20) + "}",
      std::string(20, 'x'));
  ASSERT_TRUE(header_of(valid).ok());
  const std::string alphabet = "{}[]\":,0123456789-+.eE\\ \xff\0";
  std::mt19937 random(7);
  int refused = 0;
  constexpr int kMutants = 50000;
  for (int i = 0; i < kMutants; ++i) {
    std::string mutant = valid;
    const int edits = 1 + static_cast<int>(random() % 3);
    for (int e = 0; e < edits; ++e) {
      const size_t at = random() % mutant.size();
      switch (random() % 4) {
        case 0:
          mutant[at] = static_cast<char>(mutant[at] ^ (1 << (random() % 8)));
          break;
        case 1:
          mutant[at] = alphabet[random() % alphabet.size()];
          break;
        case 2:
          mutant.resize(at + 1);
          break;
        case 3:
          mutant.insert(at, mutant.substr(random() % mutant.size(), random() % 20));
          break;
      }
    }
    // Straight to the parser, so that mutants get past the first eight bytes.
    const std::string header = mutant.size() > 8 ? mutant.substr(8, valid.size() - 28) : "";
    refused += !parse_safetensors_header(header, static_cast<int64_t>(mutant.size()), "mutant").ok();
  }
  EXPECT_GT(refused, kMutants / 2);
  EXPECT_LT(refused, kMutants);
}

}  // namespace
}  // namespace octet
