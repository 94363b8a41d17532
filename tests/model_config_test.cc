#include "worker/model/model_config.h"

#include "gtest/gtest.h"
#include "tests/checkpoint_files.h"

namespace octet {
namespace {

using testing::json;
using testing::refuses;

// The shipped config of Llama 3.1 405B Instruct FP8, less what nothing reads.
json llama_405b() {
  return json::parse(R"({"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 16384,
    "initializer_range": 0.02, "intermediate_size": 53248, "max_position_embeddings": 131072, "mlp_bias": false,
    "model_type": "llama", "num_attention_heads": 128, "num_hidden_layers": 126, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": false,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 128256})");
}

ModelConfig parsed(const json& config) {
  absl::StatusOr<ModelConfig> model = parse_model_config(config.dump());
  EXPECT_TRUE(model.ok()) << model.status();
  return model.ok() ? *model : ModelConfig();
}

TEST(ModelConfig, ReadsLlama405B) {
  const ModelConfig model = parsed(llama_405b());
  EXPECT_EQ(model.hidden_size, 16384);
  EXPECT_EQ(model.intermediate_size, 53248);
  EXPECT_EQ(model.num_hidden_layers, 126);
  EXPECT_EQ(model.num_attention_heads, 128);
  EXPECT_EQ(model.num_key_value_heads, 8);
  EXPECT_EQ(model.head_dim, 128);
  EXPECT_EQ(model.vocab_size, 128256);
  EXPECT_EQ(model.rope_theta, 500000.0);
  EXPECT_EQ(model.bos_token_id, 128000);
  EXPECT_EQ(model.eos_token_ids, (std::vector<int32_t>{128001, 128008, 128009}));
  EXPECT_EQ(model.rope_scaling, (RopeScaling{8.0, 1.0, 4.0, 8192}));
  EXPECT_FALSE(model.tie_word_embeddings);
}

TEST(ModelConfig, AcceptsEverySpelling) {
  const ModelConfig plain = parsed(llama_405b());
  const auto same = [&](const json& config) {
    const ModelConfig other = parsed(config);
    return other.to_string() == plain.to_string() && other.rope_scaling == plain.rope_scaling &&
           other.rope_theta == plain.rope_theta && other.eos_token_ids == plain.eos_token_ids;
  };
  json config = llama_405b();
  config["num_hidden_layers"] = 126.0;
  config["num_key_value_heads"] = 8.0;
  EXPECT_TRUE(same(config)) << "numbers written as 8.0";

  config = llama_405b();
  config["head_dim"] = 128;
  EXPECT_TRUE(same(config)) << "head_dim present";
  config["head_dim"] = nullptr;
  EXPECT_TRUE(same(config)) << "head_dim null";

  config = llama_405b();
  config["rope_parameters"] = config["rope_scaling"];
  config["rope_parameters"]["rope_theta"] = 500000.0;
  config.erase("rope_scaling");
  config.erase("rope_theta");
  EXPECT_TRUE(same(config)) << "rope_parameters";

  config = llama_405b();
  config["rope_scaling"].erase("rope_type");
  config["rope_scaling"]["type"] = "llama3";
  EXPECT_TRUE(same(config)) << "the older key type";

  config = llama_405b();
  config.erase("architectures");
  EXPECT_TRUE(same(config)) << "only model_type";

  config = llama_405b();
  config["num_key_value_heads"] = 16;
  EXPECT_EQ(parsed(config).num_key_value_heads, 16) << "the first upload of 405B";
  config.erase("num_key_value_heads");
  EXPECT_EQ(parsed(config).num_key_value_heads, 128) << "no grouped queries";

  config = llama_405b();
  config["eos_token_id"] = 128009;
  EXPECT_EQ(parsed(config).eos_token_ids, std::vector<int32_t>{128009});
  config["eos_token_id"] = nullptr;
  config["bos_token_id"] = nullptr;
  EXPECT_TRUE(parsed(config).eos_token_ids.empty());
  EXPECT_EQ(parsed(config).bos_token_id, -1);

  config = llama_405b();
  config["rope_scaling"] = nullptr;
  EXPECT_EQ(parsed(config).rope_scaling, std::nullopt);
  config["rope_scaling"] = {{"rope_type", "default"}};
  EXPECT_EQ(parsed(config).rope_scaling, std::nullopt);
}

TEST(ModelConfig, RefusesByNameWhatIsNotComputed) {
  const struct {
    const char* key;
    json value;
    std::vector<std::string> words;
  } cases[] = {
      {"architectures", {"MistralForCausalLM"}, {"architectures", "LlamaForCausalLM", "MistralForCausalLM"}},
      {"model_type", "mllama", {"model_type", "\"llama\"", "mllama"}},
      {"attention_bias", true, {"attention_bias", "false", "true"}},
      {"mlp_bias", true, {"mlp_bias", "false", "true"}},
      {"hidden_act", "gelu", {"hidden_act", "silu", "gelu"}},
      {"hidden_size", 16383, {"hidden_size", "even", "16383"}},
      {"hidden_size", 0, {"hidden_size", "from 2", "found 0"}},
      {"hidden_size", -8, {"hidden_size", "found -8"}},
      {"hidden_size", 1e30, {"hidden_size", "found 1e+30"}},
      {"hidden_size", 18446744073709551615u, {"hidden_size", "found 18446744073709551615"}},
      {"hidden_size", 4096.5, {"hidden_size", "found 4096.5"}},
      {"hidden_size", "4096", {"hidden_size", "found \"4096\""}},
      {"hidden_size", nullptr, {"hidden_size", "found null"}},
      {"intermediate_size", 53249, {"intermediate_size", "even"}},
      {"num_hidden_layers", 0, {"num_hidden_layers", "found 0"}},
      {"num_hidden_layers", 1 << 20, {"num_hidden_layers"}},
      {"num_attention_heads", 0, {"num_attention_heads"}},
      {"num_attention_heads", 100, {"num_key_value_heads", "divisor of num_attention_heads", "100"}},
      {"num_key_value_heads", 0, {"num_key_value_heads", "found 0"}},
      {"num_key_value_heads", 3, {"num_key_value_heads", "divisor"}},
      {"head_dim", 0, {"head_dim", "found 0"}},
      {"head_dim", 127, {"head_dim", "even"}},
      {"head_dim", 512, {"head_dim", "256", "512"}},
      {"vocab_size", 1, {"vocab_size"}},
      {"max_position_embeddings", 0, {"max_position_embeddings"}},
      {"rms_norm_eps", 0, {"rms_norm_eps", "above 0"}},
      {"rms_norm_eps", -1e-5, {"rms_norm_eps"}},
      {"rms_norm_eps", "1e-5", {"rms_norm_eps"}},
      {"rope_theta", 0, {"rope_theta"}},
      {"tie_word_embeddings", 1, {"tie_word_embeddings", "true or false"}},
      {"bos_token_id", 128256, {"bos_token_id", "128255"}},
      {"bos_token_id", {1, 2}, {"bos_token_id", "one"}},
      {"eos_token_id", -1, {"eos_token_id", "-1"}},
      {"eos_token_id", {128001, "x"}, {"eos_token_id"}},
      {"eos_token_id", true, {"eos_token_id"}},
      {"rope_scaling", "llama3", {"rope_scaling", "object"}},
      {"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}}, {"rope_scaling", "rope_type", "llama3", "yarn"}},
      {"rope_scaling", {{"type", "linear"}, {"factor", 2.0}}, {"rope_scaling", "type", "linear"}},
      {"rope_scaling", {{"rope_type", "llama3"}}, {"rope_scaling", "factor", "found nothing"}},
      {"rope_scaling",
       {{"rope_type", "llama3"},
        {"factor", 8},
        {"low_freq_factor", 4},
        {"high_freq_factor", 4},
        {"original_max_position_embeddings", 8192}},
       {"high_freq_factor", "low_freq_factor"}},
      {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 10000.0}}, {"rope_scaling"}},
      {"partial_rotary_factor", 0.5, {"partial_rotary_factor"}},
  };
  for (const auto& c : cases) {
    json config = llama_405b();
    config[c.key] = c.value;
    EXPECT_TRUE(refuses(parse_model_config(config.dump()).status(), c.words)) << c.key << " = " << c.value;
  }
}

TEST(ModelConfig, RefusesWhatIsNotAnObjectOfJson) {
  EXPECT_TRUE(refuses(parse_model_config("").status(), {"config.json", "not valid JSON"}));
  EXPECT_TRUE(refuses(parse_model_config("[]").status(), {"config.json", "expected an object"}));
  EXPECT_TRUE(refuses(parse_model_config("{}").status(), {"model_type", "llama"}));
  EXPECT_TRUE(refuses(parse_model_config(R"({"a": 1, "a": 2})").status(), {"\"a\"", "twice"}));
  EXPECT_TRUE(refuses(parse_model_config("{\"a\": \"\xff\"}").status(), {"not valid JSON"}));
  EXPECT_TRUE(refuses(parse_model_config(std::string(100000, '[')).status(), {"nested deeper than 64"}));
}

TEST(ModelConfig, ReadsGenerationDefaults) {
  absl::StatusOr<GenerationConfig> config = parse_generation_config(
      R"({"bos_token_id": 128000, "do_sample": true, "eos_token_id": [128001, 128008, 128009], "temperature": 0.6,
          "top_p": 0.9, "transformers_version": "4.43.0"})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->eos_token_ids, (std::vector<int32_t>{128001, 128008, 128009}));
  EXPECT_EQ(config->do_sample, true);
  EXPECT_EQ(config->temperature, 0.6f);
  EXPECT_EQ(config->top_p, 0.9f);
  EXPECT_EQ(config->top_k, std::nullopt);
  EXPECT_EQ(config->repetition_penalty, std::nullopt);
  EXPECT_TRUE(
      refuses(parse_generation_config(R"({"temperature": -1})").status(), {"generation_config.json", "temperature"}));
  EXPECT_TRUE(refuses(parse_generation_config(R"({"top_p": 1.5})").status(), {"top_p"}));
  EXPECT_TRUE(refuses(parse_generation_config(R"({"top_k": 2.5})").status(), {"top_k"}));
  EXPECT_TRUE(refuses(parse_generation_config(R"({"repetition_penalty": 0})").status(), {"repetition_penalty"}));
  EXPECT_TRUE(refuses(parse_generation_config(R"({"do_sample": "yes"})").status(), {"do_sample"}));
}

// Golden values in double precision, for 3.1 405B, 3.2 1B and 3.2 3B.
TEST(RopeFrequencies, MatchLlama3sPiecewiseRule) {
  const struct {
    int64_t head_dim;
    double factor;
    std::vector<std::pair<int, double>> golden;
  } cases[] = {
      {128,
       8,
       {{0, 1.0},
        {28, 3.211445995e-03},
        {29, 2.166570764e-03},
        {32, 5.248461610e-04},
        {34, 1.785078128e-04},
        {35, 9.556212354e-05},
        {63, 3.068925989e-07}}},
      {64, 32, {{15, 1.290547928e-03}, {16, 4.295567966e-04}, {17, 9.708287803e-05}, {31, 9.418306725e-08}}},
      {128, 32, {{29, 2.118406997e-03}, {35, 2.389053088e-05}, {63, 7.672314972e-08}}},
  };
  for (const auto& c : cases) {
    ModelConfig config;
    config.head_dim = c.head_dim;
    config.rope_theta = 500000.0;
    config.rope_scaling = RopeScaling{c.factor, 1.0, 4.0, 8192};
    const std::vector<float> frequencies = rope_inverse_frequencies(config);
    ASSERT_EQ(frequencies.size(), static_cast<size_t>(c.head_dim / 2));
    for (const auto& [i, value] : c.golden) {
      EXPECT_NEAR(frequencies[i] / value, 1.0, 1e-7)
          << "head_dim " << c.head_dim << ", factor " << c.factor << ", i " << i;
    }
  }
}

TEST(RopeFrequencies, AreLeftAloneWithoutScaling) {
  ModelConfig config;
  config.head_dim = 128;
  config.rope_theta = 500000.0;
  const std::vector<float> frequencies = rope_inverse_frequencies(config);
  EXPECT_NEAR(frequencies[29] / 2.616099253e-03, 1.0, 1e-7);
  EXPECT_NEAR(frequencies[63] / 2.455140791e-06, 1.0, 1e-7);
}

}  // namespace
}  // namespace octet
