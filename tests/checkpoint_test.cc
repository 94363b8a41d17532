#include "worker/checkpoint/checkpoint.h"

#include <atomic>
#include <thread>

#include "gtest/gtest.h"
#include "tests/checkpoint_files.h"

namespace octet {
namespace {

using testing::json;
using testing::RawTensor;
using testing::read_file;
using testing::refuses;
using testing::safetensors_bytes;
using testing::TempDirectory;
using testing::TinyModel;
using testing::write_file;

using Kind = ActivationScheme::Kind;

absl::StatusOr<Checkpoint> open(const TinyModel& model) {
  TempDirectory directory;  // an open checkpoint needs its files' descriptors only
  model.write(directory.path());
  return Checkpoint::open(directory.path());
}

bool warns(const Checkpoint& checkpoint, const std::string& word) {
  for (const std::string& warning : checkpoint.warnings()) {
    if (warning.find(word) != std::string::npos) return true;
  }
  return false;
}

// Writes the model in two shards, tensors dealt by turns, with an index.
void write_sharded(const TinyModel& model, const std::string& directory) {
  std::map<std::string, RawTensor> shards[2];
  json weight_map = json::object();
  int i = 0;
  for (const auto& [name, tensor] : model.tensors) {
    weight_map[name] = "model-0000" + std::to_string(i % 2 + 1) + "-of-00002.safetensors";
    shards[i++ % 2][name] = tensor;
  }
  write_file(directory + "/config.json", model.config.dump());
  write_file(directory + "/model-00001-of-00002.safetensors", safetensors_bytes(shards[0]));
  write_file(directory + "/model-00002-of-00002.safetensors", safetensors_bytes(shards[1]));
  write_file(directory + "/model.safetensors.index.json",
             json({{"metadata", {{"total_size", 1}}}, {"weight_map", weight_map}}).dump());
}

json fbgemm(const std::vector<std::string>& unquantised) {
  return {{"quant_method", "fbgemm_fp8"}, {"activation_scale_ub", 1200.0}, {"modules_to_not_convert", unquantised}};
}

json compressed_tensors(const std::string& strategy, const json& inputs) {
  return {{"quant_method", "compressed-tensors"},
          {"format", "float-quantized"},
          {"ignore", {"lm_head"}},
          {"config_groups",
           {{"group_0",
             {{"targets", {"Linear"}},
              {"weights",
               {{"num_bits", 8}, {"type", "float"}, {"symmetric", true}, {"strategy", strategy}, {"dynamic", false}}},
              {"input_activations", inputs}}}}}};
}

json fp8_args(const std::string& strategy, bool dynamic) {
  return {{"num_bits", 8}, {"type", "float"}, {"symmetric", true}, {"strategy", strategy}, {"dynamic", dynamic}};
}

const std::vector<std::string> kLinears = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                           "self_attn.o_proj", "mlp.gate_proj",    "mlp.up_proj",
                                           "mlp.down_proj"};

// Every linear of both layers FP8, weight scales of the given rank (0: [], 1: [1], 2: [out, 1], 3: [out]).
void quantise_all(TinyModel& model, int scale_kind) {
  for (int layer = 0; layer < 2; ++layer) {
    for (const std::string& linear : kLinears) {
      const std::string module = "model.layers." + std::to_string(layer) + "." + linear;
      const int64_t out = model.tensors.at(module + ".weight").shape[0];
      const std::vector<int64_t> shapes[] = {{}, {1}, {out, 1}, {out}};
      model.make_fp8(module, shapes[scale_kind]);
    }
  }
}

std::string one_float(float value) { return testing::bytes_of(std::vector<float>{value}); }

void add_input_scales(TinyModel& model, float value) {
  for (int layer = 0; layer < 2; ++layer) {
    for (const std::string& linear : kLinears) {
      model.tensors["model.layers." + std::to_string(layer) + "." + linear + ".input_scale"] = {
          "F32", {}, one_float(value)};
    }
  }
}

TEST(Checkpoint, OpensAPlainModel) {
  TinyModel model;
  absl::StatusOr<Checkpoint> checkpoint = open(model);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->tensors().size(), model.tensors.size());
  EXPECT_EQ(checkpoint->quant_method(), "none");
  EXPECT_TRUE(checkpoint->warnings().empty()) << checkpoint->warnings()[0];
  EXPECT_EQ(checkpoint->find("model.layers.2.mlp.up_proj.weight"), nullptr);
  const TensorInfo* tensor = checkpoint->find("model.layers.1.mlp.down_proj.weight");
  ASSERT_NE(tensor, nullptr);
  EXPECT_EQ(tensor->shape, (Shape{8, 12}));
  EXPECT_EQ(tensor->bytes(), 192);
  absl::StatusOr<LinearFormat> format = checkpoint->linear_format("model.layers.1.mlp.down_proj");
  ASSERT_TRUE(format.ok());
  EXPECT_EQ(format->weight, tensor);
  EXPECT_EQ(format->weight_scale, nullptr);
  EXPECT_EQ(format->activations.kind, Kind::kNone);
  EXPECT_FALSE(checkpoint->linear_format("model.norm").ok());
}

TEST(Checkpoint, ReadsEveryRectangleOfAMatrix) {
  TinyModel model;
  model.make_fp8("model.layers.0.mlp.down_proj", {});
  absl::StatusOr<Checkpoint> checkpoint = open(model);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  for (const std::string name : {"model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"}) {
    const TensorInfo& tensor = *checkpoint->find(name);
    const std::string& whole = model.tensors.at(name).data;
    const int64_t element = size_of(tensor.dtype);
    for (int64_t r0 = 0; r0 <= 8; ++r0) {
      for (int64_t r1 = r0; r1 <= 8; ++r1) {
        for (int64_t c0 = 0; c0 <= 12; c0 += 3) {
          for (int64_t c1 = c0; c1 <= 12; c1 += 2) {
            std::string expected;
            for (int64_t r = r0; r < r1; ++r) expected += whole.substr((r * 12 + c0) * element, (c1 - c0) * element);
            std::string found(expected.size(), '?');
            ASSERT_TRUE(checkpoint->read(tensor, r0, r1, c0, c1, found.data()).ok());
            ASSERT_EQ(found, expected) << name << " rows " << r0 << ".." << r1 << " columns " << c0 << ".." << c1;
          }
        }
      }
    }
  }
  const TensorInfo& norm = *checkpoint->find("model.norm.weight");
  std::string part(6, '?');
  ASSERT_TRUE(checkpoint->read(norm, 2, 5, 0, 1, part.data()).ok());
  EXPECT_EQ(part, model.tensors.at("model.norm.weight").data.substr(4, 6));
}

// Rows long enough for both ways of strided reading: picked from a stream of groups, and asked for one by one.
TEST(Checkpoint, ReadsColumnsOfLargeMatricesFromManyThreads) {
  TinyModel model(1);
  const int64_t wide = 300'000, rows = 40;
  model.config["intermediate_size"] = wide;
  model.config["hidden_size"] = rows;
  model.config["head_dim"] = 4;
  TinyModel shaped(0);
  shaped.config = model.config;
  shaped.tensors.clear();
  for (const auto& [name, tensor] : model.tensors) {
    std::vector<int64_t> shape = tensor.shape;
    const bool down = name.ends_with("down_proj.weight"),
               up = name.ends_with("gate_proj.weight") || name.ends_with("up_proj.weight");
    if (down) shape = {rows, wide};
    if (up) shape = {wide, rows};
    if (!down && !up) {
      if (shape.back() == 8 && !name.ends_with("o_proj.weight")) shape.back() = rows;
      if (name.ends_with("o_proj.weight")) shape[0] = rows;
    }
    shaped.add_bf16(name, shape);
  }
  shaped.make_fp8("model.layers.0.mlp.down_proj", {1});
  TempDirectory directory;
  shaped.write(directory.path());
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(directory.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const TensorInfo& tensor = *checkpoint->find("model.layers.0.mlp.down_proj.weight");
  const std::string& whole = shaped.tensors.at(tensor.name).data;
  const auto check = [&](int64_t c0, int64_t c1) {
    std::string found(static_cast<size_t>((rows - 1) * (c1 - c0)), '?');
    if (!checkpoint->read(tensor, 1, rows, c0, c1, found.data()).ok()) return false;
    for (int64_t r = 1; r < rows; ++r) {
      if (found.compare((r - 1) * (c1 - c0), c1 - c0, whole, r * wide + c0, c1 - c0) != 0) return false;
    }
    return true;
  };
  std::atomic<int> right = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      right += check(i * 1000, i * 1000 + 777);          // short runs
      right += check(i * 30'000, i * 30'000 + 200'000);  // long runs
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, 8);
}

TEST(Checkpoint, OpensShardsAndSymlinksIntoABlobStore) {
  TinyModel model;
  TempDirectory store, directory;
  write_sharded(model, store.path());
  const std::string snapshot = directory.path("snapshot");
  std::filesystem::create_directory(snapshot);
  int blob = 0;
  for (const auto& file : std::filesystem::directory_iterator(store.path())) {
    const std::string hidden = directory.path("blob" + std::to_string(blob++));
    std::filesystem::copy_file(file.path(), hidden);
    std::filesystem::create_symlink("../" + std::filesystem::path(hidden).filename().string(),
                                    snapshot + "/" + file.path().filename().string());
  }
  std::filesystem::create_directory_symlink(snapshot, directory.path("link"));
  for (const std::string& path : {store.path(), directory.path("link"), snapshot + "/"}) {
    absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(path);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_EQ(checkpoint->tensors().size(), model.tensors.size());
    for (const auto& [name, tensor] : model.tensors) {
      std::string found(tensor.data.size(), '?');
      const TensorInfo& info = *checkpoint->find(name);
      ASSERT_TRUE(
          checkpoint->read(info, 0, info.shape[0], 0, info.shape.rank() == 2 ? info.shape[1] : 1, found.data()).ok());
      EXPECT_EQ(found, tensor.data) << name;
    }
  }
}

TEST(Checkpoint, RefusesBrokenIndexes) {
  const struct {
    const char* what;
    std::string index;
    std::vector<std::string> words;
  } cases[] = {
      {"no weight_map", "{}", {"weight_map"}},
      {"an empty weight_map", R"({"weight_map":{}})", {"weight_map"}},
      {"a list", "[]", {"weight_map"}},
      {"a path", R"({"weight_map":{"a":"x/y.safetensors"}})", {"\"a\"", "plain file name", "x/y.safetensors"}},
      {"the parent", R"({"weight_map":{"a":"../model-00001-of-00002.safetensors"}})", {"plain file name"}},
      {"two dots", R"({"weight_map":{"a":".."}})", {"plain file name"}},
      {"an absolute path", R"({"weight_map":{"a":"/etc/passwd"}})", {"plain file name"}},
      {"a NUL", R"({"weight_map":{"a":"x\u0000y"}})", {"plain file name"}},
      {"no name", R"({"weight_map":{"a":""}})", {"plain file name"}},
      {"a number", R"({"weight_map":{"a":1}})", {"plain file name"}},
      {"a tensor twice", R"({"weight_map":{"a":"x","a":"y"}})", {"\"a\"", "twice"}},
      {"a file that is not there",
       R"({"weight_map":{"a":"model-00009-of-00009.safetensors"}})",
       {"lacks 1 of the 1 files", "00009", "download"}},
      {"a tensor that is elsewhere",
       R"({"weight_map":{"nowhere":"model-00001-of-00002.safetensors"}})",
       {"lacks 1 tensors", "nowhere"}},
  };
  for (const auto& c : cases) {
    TempDirectory directory;
    write_sharded(TinyModel(), directory.path());
    write_file(directory.path("model.safetensors.index.json"), c.index);
    EXPECT_TRUE(refuses(Checkpoint::open(directory.path()).status(), c.words)) << c.what;
  }
}

TEST(Checkpoint, RefusesDirectoriesThatAreNoModel) {
  TempDirectory directory;
  EXPECT_TRUE(refuses(Checkpoint::open(directory.path("none")).status(), {"cannot open model directory", "none"}));
  EXPECT_TRUE(refuses(Checkpoint::open(directory.path()).status(), {"config.json"}));
  write_file(directory.path("x.gguf"), "GGUF");
  EXPECT_TRUE(refuses(Checkpoint::open(directory.path("x.gguf")).status(), {"not a directory", "octet convert"}));
  write_file(directory.path("config.json"), TinyModel().config.dump());
  EXPECT_TRUE(refuses(Checkpoint::open(directory.path()).status(), {"model.safetensors", ".bin"}));
  std::filesystem::create_directory(directory.path("model.safetensors"));
  EXPECT_TRUE(refuses(Checkpoint::open(directory.path()).status(), {"not a regular file"}));
}

TEST(Checkpoint, RefusesTensorsThatDisagreeWithTheConfig) {
  const struct {
    const char* what;
    void (*change)(TinyModel&);
    std::vector<std::string> words;
  } cases[] = {
      {"a missing tensor",
       [](TinyModel& m) { m.tensors.erase("model.layers.1.mlp.up_proj.weight"); },
       {"lacks 1", "model.layers.1.mlp.up_proj.weight"}},
      {"a missing layer", [](TinyModel& m) { m.config["num_hidden_layers"] = 3; }, {"lacks 9", "and 6 more"}},
      {"an extra layer",
       [](TinyModel& m) { m.config["num_hidden_layers"] = 1; },
       {"holds 9", "does not have", "model.layers.1"}},
      {"a missing head",
       [](TinyModel& m) { m.tensors.erase("lm_head.weight"); },
       {"lm_head.weight", "tie_word_embeddings"}},
      {"an extra tensor",
       [](TinyModel& m) { m.add_bf16("model.layers.0.self_attn.q_norm.weight", {4}); },
       {"does not have", "q_norm"}},
      {"a bias",
       [](TinyModel& m) { m.add_bf16("model.layers.0.self_attn.q_proj.bias", {8}); },
       {"q_proj.bias", "no biases"}},
      {"a stray scale",
       [](TinyModel& m) { m.add_bf16("model.layers.0.self_attn.p_proj.weight_scale", {8}); },
       {"does not have", "p_proj"}},
      {"a wrong shape",
       [](TinyModel& m) {
         m.add_bf16("model.layers.0.mlp.up_proj.weight", {8, 12});
       },
       {"up_proj", "[8, 12]", "[12, 8]"}},
      {"a vector as a matrix",
       [](TinyModel& m) {
         m.add_bf16("model.norm.weight", {1, 8});
       },
       {"model.norm.weight", "[1, 8]"}},
      {"a wrong vocabulary", [](TinyModel& m) { m.config["vocab_size"] = 12; }, {"embed_tokens", "[10, 8]", "[12, 8]"}},
      {"F64 weights",
       [](TinyModel& m) {
         m.tensors["model.norm.weight"] = {"F64", {8}, std::string(64, '\0')};
       },
       {"model.norm.weight", "F64", "supported"}},
      {"unknown weights",
       [](TinyModel& m) {
         m.tensors["model.norm.weight"] = {"Q4_K", {8}, std::string(5, '\0')};
       },
       {"model.norm.weight", "Q4_K"}},
      {"integer weights",
       [](TinyModel& m) {
         m.tensors["model.layers.0.mlp.up_proj.weight"] = {"I32", {12, 8}, std::string(384, '\0')};
       },
       {"up_proj", "I32"}},
      {"E5M2 weights",
       [](TinyModel& m) {
         m.tensors["model.layers.0.mlp.up_proj.weight"] = {"F8_E5M2", {12, 8}, std::string(96, '\0')};
       },
       {"up_proj", "F8_E5M2"}},
      {"FP8 embeddings",
       [](TinyModel& m) { m.make_fp8("model.embed_tokens", {1}); },
       {"embed_tokens", "F8_E4M3", "supported"}},
      {"a tensor of six dimensions",
       [](TinyModel& m) {
         m.tensors["model.norm.weight"] = {"BF16", {1, 1, 1, 1, 1, 8}, std::string(16, '\0')};
       },
       {"6 dimensions"}},
      {"an end token outside", [](TinyModel& m) { m.config["eos_token_id"] = 10; }, {"eos_token_id", "9"}},
  };
  for (const auto& c : cases) {
    TinyModel model;
    c.change(model);
    EXPECT_TRUE(refuses(open(model).status(), c.words)) << c.what;
  }
}

TEST(Checkpoint, IgnoresWhatWritersLeaveBehind) {
  TinyModel model;
  quantise_all(model, 2);
  model.config["quantization_config"] = compressed_tensors("channel", fp8_args("token", true));
  model.add_bf16("model.layers.0.self_attn.rotary_emb.inv_freq", {2});
  model.tensors["model.layers.0.mlp.up_proj.weight_zero_point"] = {"I64", {1}, std::string(8, '\0')};
  model.tensors["model.layers.0.mlp.up_proj.input_scale"] = {"F32", {}, one_float(1)};
  model.tensors["model.layers.0.self_attn.k_proj.k_scale"] = {"F32", {}, one_float(1)};
  model.tensors["model.layers.0.self_attn.v_scale"] = {"F32", {}, one_float(1)};
  absl::StatusOr<Checkpoint> checkpoint = open(model);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_TRUE(warns(*checkpoint, "FP8 KV cache (2 scales)"));
  EXPECT_EQ(checkpoint->linear_format("model.layers.0.mlp.up_proj")->input_scale, nullptr);
}

TEST(Checkpoint, TiesTheHeadToTheEmbedding) {
  TinyModel model;
  model.config["tie_word_embeddings"] = true;
  absl::StatusOr<Checkpoint> with_head = open(model);
  ASSERT_TRUE(with_head.ok()) << with_head.status();
  EXPECT_TRUE(warns(*with_head, "lm_head.weight is not used"));
  EXPECT_EQ(with_head->find("lm_head.weight"), nullptr);
  model.tensors.erase("lm_head.weight");
  absl::StatusOr<Checkpoint> without = open(model);
  ASSERT_TRUE(without.ok()) << without.status();
  EXPECT_TRUE(without->warnings().empty());
  EXPECT_EQ(without->linear_format("lm_head")->weight, without->find("model.embed_tokens.weight"));
}

TEST(Checkpoint, ReadsMetasRecipe) {
  TinyModel model(3);
  std::vector<std::string> unquantised = {"lm_head"};
  for (int layer = 0; layer < 3; ++layer) {
    for (const std::string& linear : kLinears) {
      const std::string module = "model.layers." + std::to_string(layer) + "." + linear;
      if (layer == 1 && linear.starts_with("mlp")) {
        model.make_fp8(module, {model.tensors.at(module + ".weight").shape[0], 1});
      } else {
        unquantised.push_back(module);
      }
    }
  }
  model.config["quantization_config"] = fbgemm(unquantised);
  absl::StatusOr<Checkpoint> checkpoint = open(model);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->quant_method(), "fbgemm_fp8");
  EXPECT_TRUE(checkpoint->warnings().empty()) << checkpoint->warnings()[0];
  absl::StatusOr<LinearFormat> gate = checkpoint->linear_format("model.layers.1.mlp.gate_proj");
  ASSERT_TRUE(gate.ok());
  EXPECT_EQ(gate->weight->dtype, DType::kF8E4M3);
  EXPECT_EQ(gate->weight_scale->shape, (Shape{12, 1}));
  EXPECT_EQ(gate->activations, (ActivationScheme{.kind = Kind::kDynamicPerToken, .upper_bound = 1200.0f}));
  absl::StatusOr<std::vector<float>> scales = checkpoint->read_f32(*gate->weight_scale);
  ASSERT_TRUE(scales.ok()) << scales.status();
  EXPECT_EQ((*scales)[11], 11.5f);
  EXPECT_EQ(checkpoint->linear_format("model.layers.1.self_attn.q_proj")->activations.kind, Kind::kNone);
  EXPECT_EQ(checkpoint->linear_format("model.layers.2.mlp.gate_proj")->weight->dtype, DType::kBF16);

  // The names that Hugging Face's own script used are prefixes.
  model.config["quantization_config"] =
      fbgemm({"model.layers.0", "model.layers.2", "lm_head", "model.layers.1.self_attn"});
  model.config["quantization_config"]["activation_scale_ub"] = 64;
  checkpoint = open(model);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_TRUE(checkpoint->warnings().empty()) << checkpoint->warnings()[0];
  EXPECT_EQ(checkpoint->linear_format("model.layers.1.mlp.up_proj")->activations.upper_bound, 64.0f);
}

TEST(Checkpoint, RemarksWhereTheIgnoreListAndTheFilesDisagree) {
  TinyModel model;
  quantise_all(model, 2);
  model.config["quantization_config"] = fbgemm({"model.layers.1.mlp.up_proj"});
  absl::StatusOr<Checkpoint> checkpoint = open(model);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_TRUE(warns(*checkpoint, "lists as not quantised, but FP8 in the files: model.layers.1.mlp.up_proj"));
  EXPECT_EQ(checkpoint->linear_format("model.layers.1.mlp.up_proj")->weight->dtype, DType::kF8E4M3);

  TinyModel plain;
  plain.config["quantization_config"] = fbgemm({});
  checkpoint = open(plain);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_TRUE(warns(*checkpoint, "but not FP8 in the files"));
  EXPECT_TRUE(warns(*checkpoint, "no tensor is FP8"));

  TinyModel unnamed;
  quantise_all(unnamed, 0);
  checkpoint = open(unnamed);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_TRUE(warns(*checkpoint, "without a quantization_config"));

  TinyModel wide;
  wide.tensors["lm_head.weight"] = {"F32", {10, 8}, std::string(320, '\0')};
  checkpoint = open(wide);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_TRUE(warns(*checkpoint, "1 F16 or F32 matrices"));
}

TEST(Checkpoint, ReadsEveryRecipe) {
  const json none = nullptr;
  const json modelopt = {{"quant_method", "modelopt"}, {"quant_algo", "FP8"}, {"ignore", {"lm_head"}}};
  const json per_channel = {{"quant_method", "modelopt"}, {"quant_algo", "FP8_PER_CHANNEL_PER_TOKEN"}};
  const json presets = {{"quant_method", "compressed-tensors"},
                        {"config_groups", {{"FP8_DYNAMIC", {"Linear"}}}},
                        {"ignore", {"re:.*head"}}};
  json older = compressed_tensors("tensor", fp8_args("tensor", false));
  older.erase("quant_method");
  const struct {
    const char* what;
    const char* key;
    json recipe;
    int scale_kind;
    ActivationScheme expected;
    const char* method;
  } cases[] = {
      {"channel weights, dynamic",
       "quantization_config",
       compressed_tensors("channel", fp8_args("token", true)),
       2,
       {.kind = Kind::kDynamicPerToken},
       "compressed-tensors"},
      {"tensor weights, static",
       "quantization_config",
       compressed_tensors("tensor", fp8_args("tensor", false)),
       1,
       {.kind = Kind::kStatic, .scale = 0.25f},
       "compressed-tensors"},
      {"weights only", "quantization_config", compressed_tensors("channel", none), 3, {}, "compressed-tensors"},
      {"a preset", "quantization_config", presets, 2, {.kind = Kind::kDynamicPerToken}, "compressed-tensors"},
      {"the older key", "compression_config", older, 0, {.kind = Kind::kStatic, .scale = 0.25f}, "compressed-tensors"},
      {"modelopt", "quantization_config", modelopt, 0, {.kind = Kind::kStatic, .scale = 0.25f}, "modelopt"},
      {"modelopt per channel", "quantization_config", per_channel, 3, {.kind = Kind::kDynamicPerToken}, "modelopt"},
      {"fp8 static",
       "quantization_config",
       {{"quant_method", "fp8"}, {"activation_scheme", "static"}},
       0,
       {.kind = Kind::kStatic, .scale = 0.25f},
       "fp8"},
      {"fp8 dynamic",
       "quantization_config",
       {{"quant_method", "fp8"}, {"activation_scheme", "dynamic"}},
       0,
       {.kind = Kind::kDynamicPerToken},
       "fp8"},
  };
  for (const auto& c : cases) {
    SCOPED_TRACE(c.what);
    TinyModel model;
    quantise_all(model, c.scale_kind);
    add_input_scales(model, 0.25f);
    model.config[c.key] = c.recipe;
    absl::StatusOr<Checkpoint> checkpoint = open(model);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_EQ(checkpoint->quant_method(), c.method);
    absl::StatusOr<LinearFormat> format = checkpoint->linear_format("model.layers.1.self_attn.k_proj");
    ASSERT_TRUE(format.ok());
    EXPECT_EQ(format->activations, c.expected);
    ASSERT_NE(format->weight_scale, nullptr);
    EXPECT_EQ((*checkpoint->read_f32(*format->weight_scale))[0], 0.5f);
  }
}

TEST(Checkpoint, ReadsModelOptsSeparateFile) {
  TinyModel model;
  quantise_all(model, 0);
  add_input_scales(model, 2.0f);
  TempDirectory directory;
  model.write(directory.path());
  write_file(directory.path("hf_quant_config.json"),
             R"({"producer": {"name": "modelopt", "version": "0.15.1"},
                 "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", "*self_attn.q*"]}})");
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(directory.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->quant_method(), "modelopt");
  EXPECT_TRUE(warns(*checkpoint, "--kv-dtype fp8"));
  EXPECT_TRUE(warns(*checkpoint, "model.layers.0.self_attn.q_proj")) << "shell patterns in exclude_modules";
  EXPECT_EQ(checkpoint->linear_format("model.layers.0.mlp.up_proj")->activations.scale, 2.0f);
  write_file(directory.path("hf_quant_config.json"), R"({"quantization": {"quant_algo": "NVFP4"}})");
  EXPECT_TRUE(refuses(Checkpoint::open(directory.path()).status(), {"hf_quant_config.json", "NVFP4", "supported"}));
}

TEST(Checkpoint, AcceptsScalesOfEveryFloatType) {
  const struct {
    const char* dtype;
    std::string data;
  } cases[] = {{"F32", one_float(0.375f)}, {"BF16", "\xc0\x3e"}, {"F16", std::string("\0\x36", 2)}};
  for (const auto& c : cases) {
    TinyModel model;
    model.config["quantization_config"] = fbgemm({});
    model.make_fp8("model.layers.0.mlp.up_proj", {1}, "weight_scale_inv");
    model.tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = {c.dtype, {1}, c.data};
    absl::StatusOr<Checkpoint> checkpoint = open(model);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_EQ(*checkpoint->read_f32(*checkpoint->linear_format("model.layers.0.mlp.up_proj")->weight_scale),
              std::vector<float>{0.375f})
        << c.dtype;
  }
}

TEST(Checkpoint, RefusesRecipesByName) {
  json grouped = compressed_tensors("group", nullptr);
  json dynamic_tensor = compressed_tensors("tensor", fp8_args("tensor", true));
  json integers = compressed_tensors("channel", nullptr);
  integers["config_groups"]["group_0"]["weights"]["type"] = "int";
  json packed = compressed_tensors("channel", nullptr);
  packed["format"] = "pack-quantized";
  json two_groups = compressed_tensors("channel", fp8_args("token", true));
  two_groups["config_groups"]["group_1"] = compressed_tensors("channel", nullptr)["config_groups"]["group_0"];
  const struct {
    const char* what;
    json recipe;
    std::vector<std::string> words;
  } cases[] = {
      {"gptq", {{"quant_method", "gptq"}, {"bits", 4}}, {"gptq", "supported", "fbgemm_fp8", "modelopt"}},
      {"bitsandbytes", {{"quant_method", "bitsandbytes"}}, {"bitsandbytes"}},
      {"no name", {{"bits", 4}}, {"quant_method"}},
      {"a string", "fp8", {"quantization_config", "object"}},
      {"block scales",
       {{"quant_method", "fp8"}, {"weight_block_size", {128, 128}}},
       {"weight_block_size", "[128,128]"}},
      {"a group strategy", grouped, {"strategy", "group", "tensor or channel"}},
      {"dynamic per tensor", dynamic_tensor, {"input_activations", "dynamic per token"}},
      {"integers", integers, {"8-bit float"}},
      {"packed", packed, {"format", "pack-quantized"}},
      {"no groups", {{"quant_method", "compressed-tensors"}}, {"config_groups"}},
      {"differing groups", two_groups, {"config_groups", "same input_activations"}},
      {"a block preset",
       {{"quant_method", "compressed-tensors"}, {"config_groups", {{"FP8_BLOCK", {"Linear"}}}}},
       {"FP8_BLOCK"}},
      {"NVFP4", {{"quant_method", "modelopt"}, {"quant_algo", "NVFP4"}}, {"quant_algo", "NVFP4"}},
      {"a bad bound", {{"quant_method", "fbgemm_fp8"}, {"activation_scale_ub", -1}}, {"activation_scale_ub", "-1"}},
      {"a bad list",
       {{"quant_method", "fbgemm_fp8"}, {"modules_to_not_convert", "lm_head"}},
       {"modules_to_not_convert"}},
  };
  for (const auto& c : cases) {
    TinyModel model;
    quantise_all(model, 2);
    model.config["quantization_config"] = c.recipe;
    EXPECT_TRUE(refuses(open(model).status(), c.words)) << c.what;
  }
}

TEST(Checkpoint, RefusesBadScales) {
  const std::string module = "model.layers.0.mlp.up_proj";
  const float inf = std::numeric_limits<float>::infinity();
  const struct {
    const char* what;
    RawTensor scale;
    std::vector<std::string> words;
  } at_open[] = {
      {"blocks", {"F32", {2, 2}, std::string(16, '\0')}, {"weight_scale", "[2, 2]", "block-wise", "[12, 1]"}},
      {"a wrong length", {"F32", {8}, std::string(32, '\0')}, {"weight_scale", "[8]", "[12]"}},
      {"a transposed one", {"F32", {1, 12}, std::string(48, '\0')}, {"weight_scale", "[1, 12]"}},
      {"integers", {"I32", {}, std::string(4, '\0')}, {"weight_scale", "I32"}},
  };
  for (const auto& c : at_open) {
    TinyModel model;
    model.config["quantization_config"] = fbgemm({});
    model.make_fp8(module, {});
    model.tensors[module + ".weight_scale"] = c.scale;
    EXPECT_TRUE(refuses(open(model).status(), c.words)) << c.what;
  }
  for (const float bad : {-1.0f, inf, -inf, std::nanf("")}) {
    TinyModel model;
    model.config["quantization_config"] = fbgemm({});
    model.make_fp8(module, {});
    model.tensors[module + ".weight_scale"] = {"F32", {}, one_float(bad)};
    absl::StatusOr<Checkpoint> checkpoint = open(model);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_TRUE(
        refuses(checkpoint->read_f32(*checkpoint->find(module + ".weight_scale")).status(), {module, "the scale"}))
        << bad;
  }
  TinyModel model;
  model.make_fp8(module, {});
  model.tensors.erase(module + ".weight_scale");
  EXPECT_TRUE(refuses(open(model).status(), {module, "neither weight_scale"}));
  model.make_fp8(module, {}, "weight_scale");
  model.make_fp8(module, {}, "weight_scale_inv");
  EXPECT_TRUE(refuses(open(model).status(), {module, "both"}));

  TinyModel fixed;
  quantise_all(fixed, 0);
  fixed.config["quantization_config"] = {{"quant_method", "modelopt"}, {"quant_algo", "FP8"}};
  EXPECT_TRUE(refuses(open(fixed).status(), {"no input_scale", "modelopt"}));
  for (const float bad : {0.0f, -1.0f, inf}) {
    add_input_scales(fixed, bad);
    EXPECT_TRUE(refuses(open(fixed).status(), {"input_scale"})) << bad;
  }
  add_input_scales(fixed, 1.0f);
  fixed.tensors[module + ".input_scale"] = {"F32", {2}, std::string(8, '\0')};
  EXPECT_TRUE(refuses(open(fixed).status(), {module + ".input_scale", "[2]"}));
}

TEST(Checkpoint, FindsNanCodesWhereTheyAreRead) {
  const std::string module = "model.layers.0.mlp.up_proj";
  for (const char code : {'\x7f', '\xff'}) {
    TinyModel model;
    model.config["quantization_config"] = fbgemm({});
    model.make_fp8(module, {});
    model.tensors.at(module + ".weight").data[5 * 8 + 3] = code;
    absl::StatusOr<Checkpoint> checkpoint = open(model);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    const TensorInfo& tensor = *checkpoint->find(module + ".weight");
    std::string values(96, '\0');
    EXPECT_TRUE(refuses(checkpoint->read(tensor, 0, 12, 0, 8, values.data()), {module, "NaN code", "row 5, column 3"}));
    EXPECT_TRUE(refuses(checkpoint->read(tensor, 4, 12, 2, 6, values.data()), {"row 5, column 3"}));
    EXPECT_TRUE(checkpoint->read(tensor, 0, 12, 4, 8, values.data()).ok()) << "another slice is none of ours";
  }
}

TEST(Checkpoint, NamesFileAndTensorWhenAFileShrinks) {
  TinyModel model;
  TempDirectory directory;
  model.write(directory.path());
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(directory.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const TensorInfo& tensor = *checkpoint->find("model.norm.weight");
  std::filesystem::resize_file(directory.path("model.safetensors"), static_cast<uintmax_t>(tensor.offset + 3));
  std::string values(16, '\0');
  const absl::Status status = checkpoint->read(tensor, 0, 8, 0, 1, values.data());
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(refuses(status, {"model.norm.weight", "model.safetensors"}));
  EXPECT_TRUE(refuses(Checkpoint::open(directory.path()).status(), {"model.safetensors", "bytes of data"}));
}

TEST(Checkpoint, DigestsTellModelsApart) {
  TinyModel model;
  const uint64_t digest = open(model)->digest();
  EXPECT_EQ(open(model)->digest(), digest) << "the same model in another directory";
  TinyModel other_config;
  other_config.config["rope_theta"] = 20000.0;
  EXPECT_NE(open(other_config)->digest(), digest);
  TinyModel other_data;
  for (auto& [name, tensor] : other_data.tensors) tensor.data[0] = static_cast<char>(tensor.data[0] ^ 1);
  EXPECT_NE(open(other_data)->digest(), digest) << "a fine-tune of one shape";
  TinyModel other_types;
  other_types.make_fp8("lm_head", {});
  EXPECT_NE(open(other_types)->digest(), digest);
}

TEST(Checkpoint, ChecksGenerationDefaultsAgainstTheVocabulary) {
  TempDirectory directory;
  TinyModel().write(directory.path());
  write_file(directory.path("generation_config.json"), R"({"eos_token_id": [2, 3], "temperature": 0.5})");
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(directory.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->generation_config().eos_token_ids, (std::vector<int32_t>{2, 3}));
  EXPECT_EQ(checkpoint->generation_config().temperature, 0.5f);
  write_file(directory.path("generation_config.json"), R"({"eos_token_id": 10})");
  EXPECT_TRUE(refuses(Checkpoint::open(directory.path()).status(), {"eos_token_id 10", "vocabulary of 10"}));
}

}  // namespace
}  // namespace octet
