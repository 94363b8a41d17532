#include "worker/checkpoint/converter.h"

#include <fcntl.h>
#include <sys/file.h>

#include <cmath>
#include <limits>
#include <set>

#include "coordinator/text/tokenizer.h"
#include "gtest/gtest.h"
#include "kernels/fp8.h"
#include "tests/checkpoint_files.h"
#include "tests/gguf_files.h"
#include "worker/checkpoint/checkpoint.h"
#include "worker/checkpoint/safetensors.h"

namespace octet {
namespace {

namespace fs = std::filesystem;
using testing::GgufBuilder;
using testing::json;
using testing::read_file;
using testing::refuses;
using testing::TempDirectory;
using testing::TinyModel;
using testing::write_file;

const std::string kTinyLlama = OCTET_GOLDEN_DIR "/tiny_llama.gguf";

// Tensors of one or more safetensors files: name to dtype, shape and bytes.
std::map<std::string, testing::RawTensor> tensors_of(const std::vector<std::string>& paths) {
  std::map<std::string, testing::RawTensor> tensors;
  for (const std::string& path : paths) {
    absl::StatusOr<ReadFile> file = ReadFile::open(path);
    EXPECT_TRUE(file.ok()) << file.status();
    absl::StatusOr<SafetensorsHeader> header = read_safetensors_header(*file);
    EXPECT_TRUE(header.ok()) << header.status();
    const std::string bytes = read_file(path);
    for (const SafetensorsEntry& entry : header->tensors) {
      tensors[entry.name] = {entry.dtype, entry.shape,
                             bytes.substr(static_cast<size_t>(entry.offset), static_cast<size_t>(entry.bytes))};
    }
  }
  return tensors;
}

bool is_feed_forward(const std::string& name) { return name.find(".mlp.") != std::string::npos; }
bool is_linear(const std::string& name) { return name.find("_proj.weight") != std::string::npos; }

absl::Status convert_to(const std::string& source, const std::string& destination, Fp8Recipe recipe = Fp8Recipe::kFfn) {
  return convert({.source = source, .destination = destination, .recipe = recipe});
}

// A Llama GGUF of random F32 weights without tensors that `leave_out` names.
GgufBuilder llama_gguf(const std::string& leave_out = "") {
  GgufBuilder builder;
  builder.key("general.architecture", "llama").key("llama.context_length", uint32_t{64});
  builder.key("llama.embedding_length", uint32_t{32}).key("llama.feed_forward_length", uint32_t{32});
  builder.key("llama.block_count", uint32_t{3}).key("llama.attention.head_count", uint32_t{4});
  builder.key("llama.attention.head_count_kv", uint32_t{2}).key("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  builder.key("llama.rope.freq_base", 500000.0f).key("llama.rope.dimension_count", uint32_t{8});
  const auto add = [&](const std::string& name, const std::vector<uint64_t>& dims) {
    uint64_t elements = 1;
    for (const uint64_t dim : dims) elements *= dim;
    if (name != leave_out) builder.tensor(name, dims, 0, std::string(elements * 4, '\x3d'));
  };
  add("token_embd.weight", {32, 8});
  for (const std::string layer : {"blk.0.", "blk.1.", "blk.2."}) {
    add(layer + "attn_norm.weight", {32});
    add(layer + "attn_q.weight", {32, 32});
    add(layer + "attn_k.weight", {32, 16});
    add(layer + "attn_v.weight", {32, 16});
    add(layer + "attn_output.weight", {32, 32});
    add(layer + "ffn_norm.weight", {32});
    add(layer + "ffn_gate.weight", {32, 32});
    add(layer + "ffn_up.weight", {32, 32});
    add(layer + "ffn_down.weight", {32, 32});
  }
  add("output_norm.weight", {32});
  return builder;
}

// A Llama 3 style tokenizer: special tokens after the vocabulary.
GgufBuilder& with_llama3_tokenizer(GgufBuilder& builder) {
  builder.key("tokenizer.ggml.model", "gpt2").key("tokenizer.ggml.pre", "llama-bpe");
  builder.key("tokenizer.ggml.tokens", std::vector<std::string>{"a", "b", "ab", "1", "<|begin_of_text|>",
                                                                "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"});
  builder.key("tokenizer.ggml.token_type", std::vector<int32_t>{1, 1, 1, 1, 3, 3, 3, 3});
  builder.key("tokenizer.ggml.merges", std::vector<std::string>{"a b"});
  return builder.key("tokenizer.ggml.bos_token_id", uint32_t{4}).key("tokenizer.ggml.eos_token_id", uint32_t{7});
}

TEST(Converter, GivesTheReferencesWeightsForEveryRecipe) {
  const auto bf16 = tensors_of({OCTET_GOLDEN_DIR "/tiny_llama_bf16.safetensors"});
  const auto fp8 = tensors_of({OCTET_GOLDEN_DIR "/tiny_llama_fp8.safetensors"});
  TempDirectory directory;
  for (const char* recipe : {"none", "ffn", "all"}) {
    SCOPED_TRACE(recipe);
    const std::string destination = directory.path(recipe);
    ASSERT_TRUE(convert_to(kTinyLlama, destination, *fp8_recipe_named(recipe)).ok());
    const auto found = tensors_of({destination + "/model.safetensors"});
    size_t scales = 0;
    for (const auto& [name, golden] : bf16) {
      const bool middle = name.find("layers.1.") != std::string::npos;
      const bool quantised = is_linear(name) && (std::string(recipe) == "all" ||
                                                 (std::string(recipe) == "ffn" && is_feed_forward(name) && middle));
      const testing::RawTensor& expected = quantised ? fp8.at(name) : golden;
      ASSERT_TRUE(found.contains(name)) << name;
      EXPECT_EQ(found.at(name).dtype, expected.dtype) << name;
      EXPECT_EQ(found.at(name).shape, expected.shape) << name;
      EXPECT_TRUE(found.at(name).data == expected.data) << name;
      if (!quantised) continue;
      const std::string scale = name + "_scale";
      ASSERT_TRUE(found.contains(scale));
      EXPECT_EQ(found.at(scale).dtype, "F32");
      EXPECT_EQ(found.at(scale).shape, (std::vector<int64_t>{expected.shape[0], 1}));
      EXPECT_TRUE(found.at(scale).data == fp8.at(scale).data) << scale;
      ++scales;
    }
    EXPECT_EQ(found.size(), bf16.size() + scales);
    absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(destination);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_TRUE(checkpoint->warnings().empty()) << checkpoint->warnings()[0];
    absl::StatusOr<LinearFormat> format = checkpoint->linear_format("model.layers.1.mlp.up_proj");
    ASSERT_TRUE(format.ok());
    const bool is_ffn = std::string(recipe) == "ffn", is_none = std::string(recipe) == "none";
    EXPECT_EQ(checkpoint->quant_method(), is_none ? "none" : is_ffn ? "fbgemm_fp8" : "compressed-tensors");
    EXPECT_EQ(format->activations.upper_bound, is_ffn ? 1200.0f : std::numeric_limits<float>::infinity());
  }
}

TEST(Converter, WritesTheConfigOfAGguf) {
  TempDirectory directory;
  ASSERT_TRUE(convert_to(kTinyLlama, directory.path("m")).ok());
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(directory.path("m"));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const ModelConfig& config = checkpoint->config();
  EXPECT_EQ(config.hidden_size, 32);
  EXPECT_EQ(config.num_hidden_layers, 3);
  EXPECT_EQ(config.num_key_value_heads, 2);
  EXPECT_EQ(config.head_dim, 8);
  EXPECT_EQ(config.max_position_embeddings, 128);
  EXPECT_EQ(config.rms_norm_eps, 1e-5) << "not the nearest float's expansion";
  EXPECT_EQ(config.rope_theta, 100000.0);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_EQ(config.bos_token_id, 1);
  EXPECT_EQ(config.eos_token_ids, std::vector<int32_t>{2});
  EXPECT_EQ(checkpoint->generation_config().eos_token_ids, std::vector<int32_t>{2});
  const json text = json::parse(read_file(directory.path("m/config.json")));
  EXPECT_EQ(text["torch_dtype"], "bfloat16");
  const json& left_out = text["quantization_config"]["modules_to_not_convert"];
  EXPECT_EQ(left_out.size(), 3 * 4 + 2 * 3 + 1u) << "attention everywhere, the outer feed-forwards, lm_head";
}

TEST(Converter, WritesATokenizerThatEncodes) {
  TempDirectory directory;
  ASSERT_TRUE(convert_to(kTinyLlama, directory.path("m")).ok());
  absl::StatusOr<Tokenizer> tokenizer = Tokenizer::load(directory.path("m"));
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto ids = tokenizer->encode("hello wor", true);
  ASSERT_EQ(ids.size(), 2u);
  EXPECT_EQ(tokenizer->bytes_of(ids[0]), "hello");
  EXPECT_EQ(tokenizer->bytes_of(ids[1]), " wor");
  EXPECT_EQ(tokenizer->encode("12", false).size(), 2u) << "digits stand alone";
  EXPECT_EQ(tokenizer->encode("<|im_end|>", false, true), std::vector<int32_t>{2});
  EXPECT_NE(tokenizer->chat_template().find("<|im_start|>"), std::string::npos);
  const json text = json::parse(read_file(directory.path("m/tokenizer.json")));
  EXPECT_EQ(text["added_tokens"].size(), 3u);
  EXPECT_TRUE(text["model"]["vocab"].contains("<|im_end|>")) << "SmolLM2 has its special tokens inside the vocabulary";
  EXPECT_FALSE(text["model"]["vocab"].contains("[PAD]")) << "fillers are no tokens";
  EXPECT_EQ(text["post_processor"], nullptr);
}

TEST(Converter, WritesLlama3sTokenizerAndRopeScaling) {
  GgufBuilder builder = llama_gguf();
  with_llama3_tokenizer(builder);
  const std::vector<float> divisors = {1.0f, 1.0f, 1.0f, 1.0f};
  // Of frequencies 1, 0.0376, 0.00141, 5.3e-5 of a head of 8: wavelengths 6, 167, 4443, 118157.
  const double mix = (8192 / (2 * M_PI * std::sqrt(500000.0)) - 1) / 3;
  const std::vector<float> llama31 = {1.0f, 1.0f, static_cast<float>(1 / ((1 - mix) / 8 + mix)), 8.0f};
  TempDirectory directory;
  GgufBuilder scaled = builder, unscaled = builder, wrong = builder;
  write_file(directory.path("a.gguf"), scaled.tensor("rope_freqs.weight", {4}, 0, testing::bytes_of(llama31)).bytes());
  ASSERT_TRUE(convert_to(directory.path("a.gguf"), directory.path("a")).ok());
  const json config = json::parse(read_file(directory.path("a/config.json")));
  EXPECT_EQ(config["rope_scaling"]["rope_type"], "llama3");
  EXPECT_EQ(config["rope_scaling"]["factor"], 8.0);
  EXPECT_EQ(config["eos_token_id"], json({5, 6, 7})) << "all that end a turn";
  const json tokenizer = json::parse(read_file(directory.path("a/tokenizer.json")));
  EXPECT_EQ(tokenizer["model"]["ignore_merges"], true);
  EXPECT_EQ(tokenizer["model"]["vocab"].size(), 4u) << "Llama 3 has its special tokens after the vocabulary";
  absl::StatusOr<Tokenizer> loaded = Tokenizer::load(directory.path("a"));
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->encode("ab1", true), (std::vector<int32_t>{4, 2, 3}));

  write_file(directory.path("b.gguf"), unscaled.bytes());
  ASSERT_TRUE(convert_to(directory.path("b.gguf"), directory.path("b")).ok());
  EXPECT_FALSE(json::parse(read_file(directory.path("b/config.json"))).contains("rope_scaling"));

  std::vector<float> other = llama31;
  other[2] = 3.0f;
  write_file(directory.path("c.gguf"), wrong.tensor("rope_freqs.weight", {4}, 0, testing::bytes_of(other)).bytes());
  EXPECT_TRUE(refuses(convert_to(directory.path("c.gguf"), directory.path("c")), {"rope_freqs.weight", "frequency 2"}));
}

TEST(Converter, CutsShardsThatReadAsOneModel) {
  TempDirectory directory;
  ASSERT_TRUE(convert_to(kTinyLlama, directory.path("one"), Fp8Recipe::kAll).ok());
  ASSERT_TRUE(convert({.source = kTinyLlama,
                       .destination = directory.path("many"),
                       .recipe = Fp8Recipe::kAll,
                       .max_shard_bytes = 8000})
                  .ok());
  EXPECT_FALSE(fs::exists(directory.path("many/model.safetensors")));
  const json index = json::parse(read_file(directory.path("many/model.safetensors.index.json")));
  std::set<std::string> files;
  for (const auto& [tensor, file] : index["weight_map"].items()) files.insert(file);
  EXPECT_GT(files.size(), 3u);
  std::vector<std::string> paths;
  int64_t total = 0;
  for (const std::string& file : files) paths.push_back(directory.path("many/" + file));
  const auto one = tensors_of({directory.path("one/model.safetensors")}), many = tensors_of(paths);
  ASSERT_EQ(one.size(), many.size());
  for (const auto& [name, tensor] : one) {
    EXPECT_TRUE(many.at(name).data == tensor.data) << name;
    total += static_cast<int64_t>(tensor.data.size());
  }
  EXPECT_EQ(index["metadata"]["total_size"], total);
  for (const std::string& path : paths) {
    const auto in_file = tensors_of({path});
    int64_t bytes = 0;
    for (const auto& [name, tensor] : in_file) bytes += static_cast<int64_t>(tensor.data.size());
    EXPECT_TRUE(bytes <= 8000 || in_file.size() == 1) << path;
  }
  EXPECT_TRUE(Checkpoint::open(directory.path("many")).ok());
}

TEST(Converter, TakesUnquantisedDirectories) {
  TempDirectory directory;
  ASSERT_TRUE(convert_to(kTinyLlama, directory.path("bf16"), Fp8Recipe::kNone).ok());
  write_file(directory.path("bf16/LICENSE"), "a licence");
  write_file(directory.path("bf16/hf_quant_config.json.txt"), "notes");
  ASSERT_TRUE(convert_to(directory.path("bf16"), directory.path("again"), Fp8Recipe::kNone).ok());
  for (const char* name :
       {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"}) {
    EXPECT_EQ(read_file(directory.path("again/") + name), read_file(directory.path("bf16/") + name)) << name;
  }
  ASSERT_TRUE(convert_to(directory.path("bf16"), directory.path("fp8"), Fp8Recipe::kAll).ok());
  EXPECT_TRUE(refuses(convert_to(directory.path("fp8"), directory.path("x")),
                      {"already quantised", "compressed-tensors", "original"}));

  // F32 and F16 sources round once to BF16.
  TinyModel model(1);
  std::vector<float> values;
  for (int i = 0; i < 96; ++i) values.push_back(1.0f + static_cast<float>(i) / 1000);
  model.tensors["model.layers.0.mlp.up_proj.weight"] = {"F32", {12, 8}, testing::bytes_of(values)};
  model.tensors["model.norm.weight"] = {
      "F16", {8}, testing::bytes_of(std::vector<uint16_t>{0x3C00, 0x3C01, 0x3C04, 0x3C0C, 0xBC00, 0x0001, 0x7BFF, 0})};
  fs::create_directory(directory.path("wide"));
  model.write(directory.path("wide"));
  ASSERT_TRUE(convert_to(directory.path("wide"), directory.path("narrow"), Fp8Recipe::kNone).ok());
  const auto narrow = tensors_of({directory.path("narrow/model.safetensors")});
  std::vector<uint16_t> expected;
  for (const float value : values) expected.push_back(float_to_bf16(value));
  EXPECT_TRUE(narrow.at("model.layers.0.mlp.up_proj.weight").data == testing::bytes_of(expected));
  EXPECT_EQ(narrow.at("model.norm.weight").data,
            testing::bytes_of(std::vector<uint16_t>{0x3F80, 0x3F80, 0x3F80, 0x3F82, 0xBF80, 0x3380, 0x4780, 0}));
}

TEST(Converter, QuantisesRowsAsDocumented) {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<uint8_t> codes(4);
  EXPECT_EQ(quantize_row(std::vector<float>{448, -448, 1, 0}.data(), 4, codes.data()), 1.0f);
  EXPECT_EQ(codes, (std::vector<uint8_t>{0x7E, 0xFE, 0x38, 0}));
  EXPECT_EQ(quantize_row(std::vector<float>{0, 0, 0, 0}.data(), 4, codes.data()), 1.0f / (448 * 512)) << "the floor";
  EXPECT_EQ(codes, (std::vector<uint8_t>{0, 0, 0, 0}));
  EXPECT_EQ(quantize_row(std::vector<float>{896, 3, -3, 0}.data(), 4, codes.data()), 2.0f);
  EXPECT_EQ(codes, (std::vector<uint8_t>{0x7E, 0x3C, 0xBC, 0}));
  EXPECT_LT(quantize_row(std::vector<float>{3e38f, 0, 0, 0}.data(), 4, codes.data()), inf);
  EXPECT_EQ(codes[0], 0x7E);
}

TEST(Converter, RefusesGgufFilesByName) {
  TempDirectory directory;
  const auto converted = [&](GgufBuilder builder) {
    write_file(directory.path("x.gguf"), builder.bytes());
    return convert_to(directory.path("x.gguf"), directory.path("x"));
  };
  const auto changed = [](auto change) {
    GgufBuilder builder = llama_gguf();
    change(builder);
    return builder;
  };
  using Strings = std::vector<std::string>;
  using Ints = std::vector<int32_t>;
  const auto tokenizer = [](GgufBuilder& b, const Strings& tokens, const Ints& types, const Strings& merges) {
    b.key("tokenizer.ggml.model", "gpt2").key("tokenizer.ggml.pre", "smollm").key("tokenizer.ggml.tokens", tokens);
    b.key("tokenizer.ggml.token_type", types).key("tokenizer.ggml.merges", merges);
  };
  const struct {
    const char* what;
    GgufBuilder file;
    std::vector<std::string> words;
  } cases[] = {
      {"another architecture",
       GgufBuilder().key("general.architecture", "qwen2"),
       {"general.architecture is qwen2", "llama"}},
      {"no architecture", GgufBuilder(), {"general.architecture is nothing"}},
      {"a part of a split model",
       changed([](GgufBuilder& b) { b.key("split.count", uint32_t{3}); }),
       {"split model", "--merge"}},
      {"experts", changed([](GgufBuilder& b) { b.key("llama.expert_count", uint32_t{8}); }), {"mixture of experts"}},
      {"linear scaling",
       changed([](GgufBuilder& b) { b.key("llama.rope.scaling.type", "linear"); }),
       {"rope.scaling.type is linear"}},
      {"another head size",
       changed([](GgufBuilder& b) { b.key("llama.attention.value_length", uint32_t{16}); }),
       {"value_length"}},
      {"a missing tensor", llama_gguf("blk.1.attn_k.weight"), {"no tensor blk.1.attn_k.weight"}},
      {"no embedding", llama_gguf("token_embd.weight"), {"no tensor token_embd.weight"}},
      {"a bias",
       changed([](GgufBuilder& b) { b.tensor("blk.0.attn_q.bias", {32}, 0, std::string(128, '\0')); }),
       {"blk.0.attn_q.bias", "plain Llama"}},
      {"a wrong shape",
       [] {
         GgufBuilder b = llama_gguf("blk.0.ffn_up.weight");
         return b.tensor("blk.0.ffn_up.weight", {32, 16}, 0, std::string(2048, '\0'));
       }(),
       {"blk.0.ffn_up.weight", "[16, 32]", "[32, 32]"}},
      {"a type that is not read",
       [] {
         GgufBuilder b = llama_gguf("blk.0.ffn_up.weight");
         return b.tensor("blk.0.ffn_up.weight", {32, 32}, 6, std::string(704, '\0'));
       }(),
       {"blk.0.ffn_up.weight", "Q5_0", "Q4_1"}},
      {"no tokenizer", llama_gguf(), {"no metadata key tokenizer.ggml.model"}},
      {"SentencePiece", changed([](GgufBuilder& b) { b.key("tokenizer.ggml.model", "llama"); }), {"\"llama\"", "gpt2"}},
      {"another pre-tokenizer",
       changed([](GgufBuilder& b) { b.key("tokenizer.ggml.model", "gpt2").key("tokenizer.ggml.pre", "qwen2"); }),
       {"qwen2", "smollm", "llama-bpe"}},
      {"too few types",
       changed([&](GgufBuilder& b) {
         tokenizer(b, {"a", "b"}, {1}, {});
       }),
       {"2 tokens and 1 token types"}},
      {"a token twice",
       changed([&](GgufBuilder& b) {
         tokenizer(b, {"a", "a"}, {1, 1}, {});
       }),
       {"token \"a\" twice"}},
      {"a merge of nothing",
       changed([&](GgufBuilder& b) {
         tokenizer(b, {"a", "b"}, {1, 1}, {"a b"});
       }),
       {"merge \"a b\""}},
      {"a merge of one",
       changed([&](GgufBuilder& b) {
         tokenizer(b, {"a", "b"}, {1, 1}, {"a"});
       }),
       {"merge \"a\""}},
      {"an id outside",
       changed([&](GgufBuilder& b) {
         tokenizer(b, {"a", "b"}, {1, 1}, {});
         b.key("tokenizer.ggml.padding_token_id", uint32_t{2});
       }),
       {"padding_token_id 2"}},
      {"an end outside",
       changed([&](GgufBuilder& b) {
         tokenizer(b, {"a", "b"}, {1, 1}, {});
         b.key("tokenizer.ggml.eos_token_id", uint32_t{9});
       }),
       {"eos_token_id"}},
      {"tokens that are numbers",
       changed([](GgufBuilder& b) {
         b.key("tokenizer.ggml.model", "gpt2")
             .key("tokenizer.ggml.pre", "smollm")
             .key("tokenizer.ggml.tokens", Ints{1});
       }),
       {"tokenizer.ggml.tokens", "type"}},
  };
  for (const auto& c : cases) EXPECT_TRUE(refuses(converted(c.file), c.words)) << c.what;
  EXPECT_FALSE(fs::exists(directory.path("x")));
  EXPECT_FALSE(fs::exists(directory.path(".x.partial")));
  EXPECT_TRUE(refuses(convert_to(directory.path("none.gguf"), directory.path("x")), {"cannot open", "none.gguf"}));
}

TEST(Converter, SaysWhenARecipeLeavesEverythingOut) {
  TempDirectory directory;
  TinyModel(2).write(directory.path());
  EXPECT_TRUE(refuses(convert_to(directory.path(), directory.path("x"), Fp8Recipe::kFfn),
                      {"first and the last layer", "--fp8 all"}));
  EXPECT_EQ(fp8_recipe_named("fnn"), std::nullopt);
}

TEST(Converter, RefusesWeightsThatAreNoNumbers) {
  TempDirectory directory;
  for (const uint16_t bad : {uint16_t{0x7F80}, uint16_t{0x7FC0}}) {
    TinyModel model(1);
    std::memcpy(model.tensors.at("lm_head.weight").data.data() + 20, &bad, 2);
    model.write(directory.path());
    EXPECT_TRUE(refuses(convert_to(directory.path(), directory.path("x"), Fp8Recipe::kAll),
                        {"lm_head.weight", "NaN or infinity"}));
    EXPECT_FALSE(fs::exists(directory.path("x")));
    EXPECT_FALSE(fs::exists(directory.path(".x.partial"))) << "nothing half-written stays";
  }
}

TEST(Converter, NeverOverwrites) {
  TempDirectory directory;
  fs::create_directory(directory.path("there"));
  EXPECT_TRUE(refuses(convert_to(kTinyLlama, directory.path("there")), {"there exists already", "remove it"}));
  EXPECT_TRUE(refuses(convert_to(kTinyLlama, directory.path("there") + "/"), {"exists already"}));
  fs::create_symlink("nowhere", directory.path("dangling"));
  EXPECT_TRUE(refuses(convert_to(kTinyLlama, directory.path("dangling")), {"exists already"}));
  EXPECT_TRUE(refuses(convert_to(kTinyLlama, "/"), {"cannot be the name"}));
  EXPECT_TRUE(refuses(convert_to(kTinyLlama, directory.path("x/..")), {"exists already"}));
  write_file(directory.path("file"), "");
  EXPECT_TRUE(refuses(convert_to(kTinyLlama, directory.path("file/m")), {"cannot create"}));
  EXPECT_TRUE(convert_to(kTinyLlama, directory.path("new/parents/m") + "/").ok());
  EXPECT_TRUE(fs::exists(directory.path("new/parents/m/config.json")));
}

TEST(Converter, LeavesNothingWhenItIsCancelled) {
  TempDirectory directory;
  std::atomic<bool> cancelled = false;
  int calls = 0;
  ConvertOptions options{.source = kTinyLlama, .destination = directory.path("m"), .recipe = Fp8Recipe::kAll};
  options.cancelled = &cancelled;
  options.progress = [&](const ConvertProgress& progress) {
    EXPECT_TRUE(fs::exists(directory.path(".m.partial"))) << "written beside its destination";
    EXPECT_FALSE(fs::exists(directory.path("m")));
    EXPECT_GT(progress.bytes_done, 0);
    EXPECT_LE(progress.bytes_done, progress.bytes_total);
    if (++calls == 5) cancelled = true;
  };
  EXPECT_EQ(convert(options).code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(calls, 5);
  EXPECT_TRUE(fs::is_empty(directory.path()));
}

TEST(Converter, ReportsProgressToTheLastByte) {
  TempDirectory directory;
  ConvertProgress last;
  ConvertOptions options{.source = kTinyLlama, .destination = directory.path("m")};
  options.progress = [&](const ConvertProgress& progress) {
    EXPECT_GT(progress.bytes_done, last.bytes_done);
    last = progress;
  };
  ASSERT_TRUE(convert(options).ok());
  EXPECT_EQ(last.bytes_done, last.bytes_total);
  int64_t bytes = 0;
  for (const auto& [name, tensor] : tensors_of({directory.path("m/model.safetensors")}))
    bytes += static_cast<int64_t>(tensor.data.size());
  EXPECT_EQ(bytes, last.bytes_total);
}

TEST(Converter, CleansUpAfterAKilledRunButNotAfterALivingOne) {
  TempDirectory directory;
  fs::create_directories(directory.path(".m.partial/old"));
  write_file(directory.path(".m.partial/model.safetensors"), "half");
  {
    FileDescriptor living(::open(directory.path(".m.partial").c_str(), O_RDONLY | O_DIRECTORY));
    ASSERT_EQ(::flock(living.get(), LOCK_EX | LOCK_NB), 0);
    EXPECT_TRUE(refuses(convert_to(kTinyLlama, directory.path("m")), {"another process", ".m.partial"}));
    EXPECT_EQ(read_file(directory.path(".m.partial/model.safetensors")), "half");
  }
  ASSERT_TRUE(convert_to(kTinyLlama, directory.path("m")).ok());
  EXPECT_FALSE(fs::exists(directory.path(".m.partial")));
  EXPECT_FALSE(fs::exists(directory.path("m/old")));
  EXPECT_TRUE(Checkpoint::open(directory.path("m")).ok());
}

}  // namespace
}  // namespace octet
