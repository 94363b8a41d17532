// Slices and ranks: every head, column and vocabulary row has exactly one owner.
#include "worker/model/shard_spec.h"

#include <gtest/gtest.h>

namespace octet {
namespace {

ModelConfig llama_405b() {
  ModelConfig config;
  config.vocab_size = 128256;
  config.hidden_size = 16384;
  config.intermediate_size = 53248;
  config.num_hidden_layers = 126;
  config.num_attention_heads = 128;
  config.num_key_value_heads = 8;
  config.head_dim = 128;
  return config;
}

TEST(ShardSpec, Cuts405BOverEightRanksAsTheFormatsSay) {
  const ShardSpec shard = *ShardSpec::make(llama_405b(), 3, 8);
  EXPECT_EQ(shard.run(), (SliceRun{3, 1, 8}));
  EXPECT_EQ(shard.heads(), 16);
  EXPECT_EQ(shard.kv_heads(), 1);
  EXPECT_EQ(shard.query_rows(), (Range{3 * 2048, 4 * 2048}));
  EXPECT_EQ(shard.kv_rows(), (Range{3 * 128, 4 * 128}));
  EXPECT_EQ(shard.ffn(), (Range{3 * 6656, 4 * 6656}));
  EXPECT_EQ(shard.vocab(), (Range{3 * 16032, 4 * 16032}));
}

TEST(ShardSpec, EveryRangeIsCoveredOnceByAnyNumberOfRanks) {
  ModelConfig config = llama_405b();
  config.intermediate_size = 1002;  // does not divide by 8: bounds are rounded down to even
  config.vocab_size = 1238;
  for (int ranks = 1; ranks <= 8; ++ranks) {
    int64_t query = 0, kv = 0, ffn = 0, vocab = 0;
    int slices = 0;
    for (int rank = 0; rank < ranks; ++rank) {
      const ShardSpec shard = *ShardSpec::make(config, rank, ranks);
      EXPECT_EQ(shard.run().first, slices);
      EXPECT_EQ(shard.query_rows().begin, query);
      EXPECT_EQ(shard.kv_rows().begin, kv);
      EXPECT_EQ(shard.ffn().begin, ffn);
      EXPECT_EQ(shard.vocab().begin, vocab);
      EXPECT_LE(std::abs(shard.run().count - 8 / ranks), 1);
      EXPECT_EQ(shard.ffn_column_ends(Arithmetic::kReproducible).back(), shard.ffn().size());
      EXPECT_EQ(shard.vocab_ends().back(), shard.vocab().size());
      EXPECT_EQ(shard.query_column_ends(Arithmetic::kReproducible).back(), shard.query_rows().size());
      for (int64_t end : shard.ffn_column_ends(Arithmetic::kReproducible)) EXPECT_EQ(end % 2, 0);
      slices += shard.run().count;
      query = shard.query_rows().end;
      kv = shard.kv_rows().end;
      ffn = shard.ffn().end;
      vocab = shard.vocab().end;
    }
    EXPECT_EQ(slices, 8);
    EXPECT_EQ(query, 16384);
    EXPECT_EQ(kv, 1024);
    EXPECT_EQ(ffn, 1002);
    EXPECT_EQ(vocab, 1238);
  }
}

TEST(ShardSpec, SliceBoundsDoNotDependOnTheNumberOfRanks) {
  ModelConfig config = llama_405b();
  config.intermediate_size = 1002;
  const ShardSpec alone = *ShardSpec::make(config, 0, 1);
  for (int rank = 0; rank < 3; ++rank) {
    const ShardSpec shard = *ShardSpec::make(config, rank, 3);
    for (int i = 0; i < shard.run().count; ++i) {
      EXPECT_EQ(shard.ffn().begin + shard.ffn_column_ends(Arithmetic::kReproducible)[i],
                alone.ffn_column_ends(Arithmetic::kReproducible)[shard.run().first + i]);
    }
  }
}

TEST(ShardSpec, RefusesMoreRanksThanSlicesWithASentence) {
  const auto shard = ShardSpec::make(llama_405b(), 0, 16);
  ASSERT_FALSE(shard.ok());
  EXPECT_EQ(shard.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(shard.status().message().find("start 1 to 8 ranks"), std::string::npos) << shard.status();
}

TEST(ShardSpec, RefusesDimensionsTooSmallToCut) {
  ModelConfig config = llama_405b();
  config.vocab_size = 14;
  EXPECT_FALSE(ShardSpec::make(config, 0, 1).ok());
}

TEST(ShardSpec, MakesOneLeafOfARankInFastArithmetic) {
  const ShardSpec shard = *ShardSpec::make(llama_405b(), 1, 3);
  const SliceRun slices = shard.leaves(Arithmetic::kReproducible), whole = shard.leaves(Arithmetic::kFast);
  EXPECT_EQ(std::tuple(slices.first, slices.count, slices.total), std::tuple(3, 3, 8));
  EXPECT_EQ(std::tuple(whole.first, whole.count, whole.total), std::tuple(1, 1, 3));
  EXPECT_EQ(shard.ffn_column_ends(Arithmetic::kFast), std::vector<int64_t>{shard.ffn().size()});
  EXPECT_EQ(shard.query_column_ends(Arithmetic::kFast), std::vector<int64_t>{shard.query_rows().size()});
}

}  // namespace
}  // namespace octet
