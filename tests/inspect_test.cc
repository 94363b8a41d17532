#include "worker/checkpoint/inspect.h"

#include "gtest/gtest.h"
#include "tests/checkpoint_files.h"
#include "worker/checkpoint/converter.h"

namespace octet {
namespace {

using testing::TempDirectory;
using testing::TinyModel;

const PartSummary* find(const CheckpointSummary& summary, Part part, const std::string& weights) {
  for (const PartSummary& candidate : summary.parts) {
    if (candidate.part == part && candidate.weights == weights) return &candidate;
  }
  return nullptr;
}

TEST(Inspect, TellsHowEachProjectionIsStored) {
  TempDirectory directory;
  TinyModel model(4);
  const int64_t parameters = 10 * 8 * 2 + 8 + 4 * (8 + 64 + 32 + 32 + 64 + 8 + 96 + 96 + 96);
  model.write(directory.path());
  ASSERT_TRUE(
      convert({.source = directory.path(), .destination = directory.path("fp8"), .recipe = Fp8Recipe::kFfn}).ok());
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(directory.path("fp8"));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const CheckpointSummary summary = summarize(*checkpoint);
  EXPECT_EQ(summary.parameters, parameters);
  EXPECT_EQ(summary.quant_method, "fbgemm_fp8");
  const PartSummary* quantised = find(summary, Part::kGate, "F8_E4M3");
  ASSERT_NE(quantised, nullptr);
  EXPECT_EQ(quantised->layers, (std::vector<std::pair<int64_t, int64_t>>{{1, 2}}));
  EXPECT_EQ(quantised->scales, "F32 per row");
  EXPECT_EQ(quantised->inputs, "e4m3 per token, amax up to 1200");
  EXPECT_EQ(quantised->bytes, 2 * (96 + 12 * 4));
  const PartSummary* outer = find(summary, Part::kGate, "BF16");
  ASSERT_NE(outer, nullptr);
  EXPECT_EQ(outer->layers, (std::vector<std::pair<int64_t, int64_t>>{{0, 0}, {3, 3}}));
  EXPECT_EQ(find(summary, Part::kQuery, "BF16")->layers, (std::vector<std::pair<int64_t, int64_t>>{{0, 3}}));
  EXPECT_TRUE(find(summary, Part::kHead, "BF16")->layers.empty());
  int64_t bytes = 0;
  for (const PartSummary& part : summary.parts) bytes += part.bytes;
  EXPECT_EQ(bytes, summary.bytes);
  EXPECT_EQ(bytes, parameters * 2 - 6 * 96 + 4 * 2 * (12 + 12 + 8));

  const std::string text = to_text(summary);
  for (const char* words : {"LlamaForCausalLM, 4 layers", "fbgemm_fp8", "gate_proj     0, 3       BF16",
                            "gate_proj     1-2        F8_E4M3  F32 per row"}) {
    EXPECT_NE(text.find(words), std::string::npos) << words << " in\n" << text;
  }
}

TEST(Inspect, GroupsDigitsByThousands) {
  EXPECT_EQ(with_commas(0), "0");
  EXPECT_EQ(with_commas(999), "999");
  EXPECT_EQ(with_commas(1000), "1,000");
  EXPECT_EQ(with_commas(405853388800), "405,853,388,800");
}

}  // namespace
}  // namespace octet
