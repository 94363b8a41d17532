#include "worker/checkpoint/gguf.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <random>

#include "gtest/gtest.h"
#include "tests/checkpoint_files.h"
#include "tests/gguf_files.h"

namespace octet {
namespace {

using testing::GgufBuilder;
using testing::GgufBytes;
using testing::read_file;
using testing::refuses;
using testing::TempDirectory;
using testing::write_file;

absl::StatusOr<GgufFile> open(const std::string& bytes) {
  TempDirectory directory;
  write_file(directory.path("x.gguf"), bytes);
  return GgufFile::open(directory.path("x.gguf"));
}

TEST(Gguf, DequantizesEveryTypeAsTheReferenceDoes) {
  absl::StatusOr<GgufFile> gguf = GgufFile::open(OCTET_GOLDEN_DIR "/gguf_types.gguf");
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  const std::string golden = read_file(OCTET_GOLDEN_DIR "/gguf_types.bin");
  ASSERT_EQ(gguf->tensors().size(), 6u);
  size_t at = 0;
  for (const auto& [name, tensor] : gguf->tensors()) {
    std::vector<float> values(static_cast<size_t>(tensor.shape[0] * tensor.shape[1]));
    ASSERT_TRUE(gguf->read_f32(tensor, 0, tensor.shape[0], values.data()).ok());
    ASSERT_LE(at + values.size() * 4, golden.size());
    for (size_t i = 0; i < values.size(); ++i) {
      uint32_t expected, found;
      std::memcpy(&expected, golden.data() + at + i * 4, 4);
      std::memcpy(&found, &values[i], 4);
      ASSERT_EQ(found, expected) << name << " element " << i << ": " << values[i];
    }
    // Any range of rows is a part of the whole.
    std::vector<float> part(static_cast<size_t>(tensor.shape[1]));
    ASSERT_TRUE(gguf->read_f32(tensor, 1, 2, part.data()).ok());
    EXPECT_EQ(std::memcmp(part.data(), values.data() + tensor.shape[1], part.size() * 4), 0) << name;
    at += values.size() * 4;
  }
  EXPECT_EQ(at, golden.size());
}

TEST(Gguf, ReadsMetadataOfEveryType) {
  GgufBuilder builder;
  builder.add("u8", 0, GgufBytes().raw(uint8_t{200})).add("i8", 1, GgufBytes().raw(int8_t{-5}));
  builder.add("u16", 2, GgufBytes().raw(uint16_t{60000})).add("i16", 3, GgufBytes().raw(int16_t{-300}));
  builder.add("i32", 5, GgufBytes().raw(int32_t{-7})).add("u64", 10, GgufBytes().raw(uint64_t{1} << 40));
  builder.add("i64", 11, GgufBytes().raw(int64_t{-1})).add("f64", 12, GgufBytes().raw(0.1));
  builder.key("u32", uint32_t{4000000000}).key("f32", 0.5f).key("yes", true).key("text", "Grüße");
  builder.key("texts", std::vector<std::string>{"a", "", "b c"}).key("numbers", std::vector<int32_t>{1, -2});
  builder.tensor("t", {2, 3}, 0, std::string(24, '\0'));
  absl::StatusOr<GgufFile> gguf = open(builder.bytes());
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  const std::pair<const char*, int64_t> integers[] = {{"u8", 200},
                                                      {"i8", -5},
                                                      {"u16", 60000},
                                                      {"i16", -300},
                                                      {"i32", -7},
                                                      {"u32", 4000000000},
                                                      {"u64", int64_t{1} << 40},
                                                      {"i64", -1}};
  for (const auto& [key, value] : integers) EXPECT_EQ(*gguf->get<int64_t>(key), value) << key;
  EXPECT_EQ(*gguf->get<double>("f64"), 0.1);
  EXPECT_EQ(*gguf->get<double>("f32"), 0.5);
  EXPECT_EQ(*gguf->get<bool>("yes"), true);
  EXPECT_EQ(*gguf->get<std::string>("text"), "Grüße");
  EXPECT_EQ(*gguf->get<std::vector<std::string>>("texts"), (std::vector<std::string>{"a", "", "b c"}));
  EXPECT_EQ(*gguf->get<std::vector<int64_t>>("numbers"), (std::vector<int64_t>{1, -2}));
  EXPECT_EQ(*gguf->get<int64_t>("absent"), std::nullopt);
  EXPECT_TRUE(refuses(gguf->get<int64_t>("text").status(), {"text", "unexpected type"}));
  EXPECT_EQ(gguf->find("t")->shape, (std::vector<int64_t>{3, 2})) << "outermost dimension first";
}

TEST(Gguf, RefusesBrokenFiles) {
  const std::string block(18, '\0');
  const auto with = [](auto change) {
    GgufBuilder builder;
    change(builder);
    return builder.bytes();
  };
  const auto tensor = [&](const std::vector<uint64_t>& dims, uint32_t type, const std::string& data,
                          int64_t shift = 0) { return GgufBuilder().tensor("t", dims, type, data, shift).bytes(); };
  const std::string good = tensor({32}, 2, block);
  ASSERT_TRUE(open(good).ok());
  const uint64_t huge = uint64_t{1} << 62;
  const struct {
    const char* what;
    std::string file;
    std::vector<std::string> words;
  } cases[] = {
      {"an empty file", "", {"ends inside its head"}},
      {"another format", std::string(64, 'x'), {"does not begin with GGUF"}},
      {"version 1", with([](GgufBuilder& b) { b.version = 1; }), {"version 1", "2 and 3"}},
      {"a big-endian file", with([](GgufBuilder& b) { b.version = 0x03000000; }), {"big-endian"}},
      {"too many tensors", with([](GgufBuilder& b) { b.extra_tensors = 1 << 30; }), {"claims 1073741824 tensors"}},
      {"too many keys", with([](GgufBuilder& b) { b.extra_keys = -1; }), {"metadata keys"}},
      {"a missing tensor", with([](GgufBuilder& b) { b.extra_tensors = 1; }), {"x.gguf"}},
      {"a missing key", with([](GgufBuilder& b) { b.extra_keys = 1; }), {"x.gguf"}},
      {"a key twice", with([](GgufBuilder& b) { b.key("a", true).key("a", true); }), {"key a appears twice"}},
      {"a value of no type",
       with([](GgufBuilder& b) { b.add("a", 13, GgufBytes().raw(1)); }),
       {"a: a value of type 13"}},
      {"a boolean of 2", with([](GgufBuilder& b) { b.add("a", 7, GgufBytes().raw(uint8_t{2})); }), {"neither 0 nor 1"}},
      {"a number beyond int64",
       with([](GgufBuilder& b) { b.add("a", 10, GgufBytes().raw(~uint64_t{0})); }),
       {"beyond 2^63"}},
      {"a huge string",
       with([&](GgufBuilder& b) { b.add("a", 8, GgufBytes().raw(huge)); }),
       {"a string of 4611686018427387904"}},
      {"a string of 2^64 - 1",
       with([](GgufBuilder& b) { b.add("a", 8, GgufBytes().raw(~uint64_t{0})); }),
       {"a string of"}},
      {"a huge array",
       with([&](GgufBuilder& b) { b.add("a", 9, GgufBytes().raw(uint32_t{4}).raw(huge)); }),
       {"an array of 4611686018427387904"}},
      {"an array that is a little too long",
       with([](GgufBuilder& b) { b.add("a", 9, GgufBytes().raw(uint32_t{12}).raw(uint64_t{40}).raw(uint64_t{0})); }),
       {"more than the file holds"}},
      {"an array of arrays",
       with([](GgufBuilder& b) { b.add("a", 9, GgufBytes().raw(uint32_t{9}).raw(uint64_t{1})); }),
       {"an array of type 9"}},
      {"an alignment of 3",
       with([](GgufBuilder& b) { b.key("general.alignment", uint32_t{3}); }),
       {"general.alignment is 3"}},
      {"an alignment of 0",
       with([](GgufBuilder& b) { b.key("general.alignment", uint32_t{0}); }),
       {"general.alignment is 0"}},
      {"a huge alignment",
       with([](GgufBuilder& b) { b.key("general.alignment", uint32_t{1} << 31); }),
       {"general.alignment"}},
      {"an alignment that is a string",
       with([](GgufBuilder& b) { b.key("general.alignment", "32"); }),
       {"general.alignment", "type"}},
      {"no dimensions", tensor({}, 0, ""), {"tensor t has 0 dimensions"}},
      {"five dimensions", tensor({1, 1, 1, 1, 1}, 0, "1234"), {"5 dimensions"}},
      {"a dimension of 0", tensor({0}, 0, ""), {"a dimension of 0"}},
      {"dimensions whose product wraps",
       tensor({uint64_t{1} << 32, uint64_t{1} << 32}, 0, ""),
       {"a dimension of 4294967296"}},
      {"bytes that wrap", tensor({huge}, 0, ""), {"4611686018427387904 elements"}},
      {"a type that is none", tensor({32}, 99, block), {"type 99"}},
      {"a broken block", tensor({31}, 2, block), {"rows of 31 elements", "blocks of 32"}},
      {"an offset beyond int64", tensor({32}, 2, block, INT64_MIN), {"its data at 9223372036854775808"}},
      {"a hole", tensor({32}, 2, block, 32), {"begins at 32 of the data, expected 0"}},
      {"an unaligned offset", tensor({32}, 2, block, 1), {"begins at 1"}},
      {"an overlap",
       GgufBuilder().tensor("a", {32}, 2, block).tensor("b", {32}, 2, block, -32).bytes(),
       {"tensor b", "begins at 0"}},
      {"a name twice",
       GgufBuilder().tensor("a", {32}, 2, block).tensor("a", {32}, 2, block).bytes(),
       {"tensor a appears twice"}},
      {"more data than there is", tensor({32, 1000}, 2, block), {"beyond the end"}},
      {"data of no tensor", good + std::string(32, 'x'), {"belong to nothing"}},
  };
  for (const auto& c : cases) EXPECT_TRUE(refuses(open(c.file).status(), c.words)) << c.what;
  for (size_t size = 0; size < good.size() - 14; ++size) {  // its last 14 bytes are padding that writers may leave out
    EXPECT_FALSE(open(good.substr(0, size)).ok()) << "cut to " << size << " bytes";
  }
}

TEST(Gguf, RefusesTypesItCannotReadByName) {
  absl::StatusOr<GgufFile> gguf = open(GgufBuilder().tensor("t", {256, 2}, 14, std::string(420, '\0')).bytes());
  ASSERT_TRUE(gguf.ok()) << gguf.status();
  float value;
  EXPECT_TRUE(refuses(gguf->read_f32(*gguf->find("t"), 0, 0, &value), {"tensor t", "Q6_K", "Q4_1"}));
}

// Whatever bytes of a valid file change: an answer, never a crash, and never a read outside the file.
TEST(Gguf, SurvivesThousandsOfMutants) {
  GgufBuilder builder;
  builder.key("general.architecture", "llama").key("a", uint32_t{32}).key("b", std::vector<std::string>{"x", "yy"});
  builder.key("c", std::vector<int32_t>{1, 2, 3})
      .tensor("q", {32, 2}, 2, std::string(36, '\1'))
      .tensor("f", {3}, 0, std::string(12, '\2'));
  const std::string valid = builder.bytes();
  ASSERT_TRUE(open(valid).ok());
  // In memory: a disk would spend its time on truncating and writing one file thousands of times.
  FileDescriptor memory(::memfd_create("mutant", 0));
  const std::string path = "/proc/self/fd/" + std::to_string(memory.get());
  std::mt19937 random(11);
  int refused = 0;
  constexpr int kMutants = 50000;
  for (int i = 0; i < kMutants; ++i) {
    std::string mutant = valid;
    const int edits = 1 + static_cast<int>(random() % 3);
    for (int e = 0; e < edits; ++e) {
      const size_t at = random() % mutant.size();
      switch (random() % 5) {
        case 0:
          mutant[at] = static_cast<char>(mutant[at] ^ (1 << (random() % 8)));
          break;
        case 1:
          mutant[at] = static_cast<char>(random());
          break;
        case 2:
          for (size_t k = at; k < std::min(at + 8, mutant.size()); ++k) mutant[k] = '\xff';
          break;
        case 3:
          mutant.resize(at + 1);
          break;
        case 4:
          mutant.insert(at, mutant.substr(random() % mutant.size(), random() % 16));
          break;
      }
    }
    ASSERT_EQ(::ftruncate(memory.get(), 0), 0);
    ASSERT_EQ(::pwrite(memory.get(), mutant.data(), mutant.size(), 0), static_cast<ssize_t>(mutant.size()));
    absl::StatusOr<GgufFile> gguf = GgufFile::open(path);
    refused += !gguf.ok();
    if (!gguf.ok()) continue;
    for (const auto& [name, tensor] : gguf->tensors()) {
      int64_t elements = 1, rows = 1;
      for (const int64_t dim : tensor.shape) elements *= dim;
      for (size_t d = 0; d + 1 < tensor.shape.size() || d == 0; ++d) rows *= tensor.shape[d];
      std::vector<float> values(static_cast<size_t>(elements));
      gguf->read_f32(tensor, 0, rows, values.data()).IgnoreError();
    }
  }
  EXPECT_GT(refused, kMutants / 3);
  EXPECT_LT(refused, kMutants);
}

}  // namespace
}  // namespace octet
