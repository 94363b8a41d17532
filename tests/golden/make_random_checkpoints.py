"""Writes random checkpoints shaped like Llama 3.1, one directory per format: make_random_checkpoints.py OUT_DIR [--shape S]
Seeds are fixed; files come from package `safetensors`; tokenizer.json is a tiny byte-level BPE in Llama 3's structure."""

import argparse
import json
import pathlib
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors.torch import save_file

import llama_reference as reference

LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
CALIBRATION_TOKENS = 256


@dataclass
class Format:
    name: str
    seed: int
    shape: dict = field(default_factory=dict)  # config.json keys that differ from SHAPES' base
    dtype: torch.dtype = torch.bfloat16  # of what is not FP8
    recipe: str = ""  # a key of RECIPES
    original_context: int = 8192  # of RoPE's scaling
    rope_parameters: bool = False  # config.json in the newer spelling
    eos_token_ids: tuple = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    shards: int = 1


# head_dim 8 gives four RoPE frequencies: with either original_context some are kept, one is blended and some are divided.
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 8, "vocab_size": 288},
    "small": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 16,
              "num_key_value_heads": 8, "head_dim": 32, "vocab_size": 512},
}

FORMATS = [
    Format("bf16", 1),
    Format("f16_head_dim_absent", 2, {"num_attention_heads": 8, "head_dim": None}, torch.float16, original_context=256),
    Format("f32_rope_parameters", 3, {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 8}, torch.float32,
           original_context=256, rope_parameters=True, eos_token_ids=("<|end_of_text|>",)),
    # 132 columns and 300 vocabulary rows make 8 slices of unequal lengths.
    Format("fbgemm_fp8", 4, {"hidden_size": 48, "intermediate_size": 132, "num_hidden_layers": 3, "vocab_size": 300},
           recipe="fbgemm_fp8"),
    Format("compressed_tensors_static", 5, recipe="ct_static", original_context=256),
    Format("compressed_tensors_dynamic", 6, recipe="ct_dynamic", shards=3),
    Format("compressed_tensors_weight_only", 7, recipe="ct_weight_only", original_context=256),
    Format("modelopt_fp8", 8, recipe="modelopt", original_context=256),
]


# ---- Weights

def random_weights(config, seed):
    """Float32 weights whose logits spread by about 2.5, with some attention that is peaked and some outlier channels."""
    rng = np.random.default_rng(seed)
    hidden, d = config["hidden_size"], reference.head_dim(config)
    q_rows, kv_rows = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    inner, vocab = config["intermediate_size"], config["vocab_size"]

    def matrix(rows, columns, gain):
        # Rows of different size, so that one scale per row and one per tensor give different codes.
        sizes = np.exp(0.3 * rng.standard_normal((rows, 1)))
        return (gain / np.sqrt(columns) * sizes * rng.standard_normal((rows, columns))).astype(np.float32)

    def norm():
        weight = 1.0 + 0.15 * rng.standard_normal(hidden)
        weight[rng.choice(hidden, size=max(hidden // 32, 1), replace=False)] *= 3.0
        return weight.astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(vocab, hidden, np.sqrt(hidden)), "model.norm.weight": norm(),
               "lm_head.weight": matrix(vocab, hidden, 2.0)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        weights |= {layer + "input_layernorm.weight": norm(), layer + "post_attention_layernorm.weight": norm()}
        shapes = {"self_attn.q_proj": (q_rows, hidden, 1.3), "self_attn.k_proj": (kv_rows, hidden, 1.3),
                  "self_attn.v_proj": (kv_rows, hidden, 1.0), "self_attn.o_proj": (hidden, q_rows, 1.0),
                  "mlp.gate_proj": (inner, hidden, 1.0), "mlp.up_proj": (inner, hidden, 1.0),
                  "mlp.down_proj": (hidden, inner, 1.0)}
        weights |= {f"{layer}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
    return weights


def input_amax(config, weights):
    """The greatest input of every block linear over random tokens, as a calibration run would see it."""
    linears = {n: reference.Linear(weights[n + ".weight"]) for n in reference.block_linears(config)}
    model = reference.Llama(config, weights, linears)
    model.amax = {}
    rng = np.random.default_rng(12345)
    model.log_probs(rng.integers(0, config["vocab_size"], CALIBRATION_TOKENS).tolist())
    return model.amax


# ---- Recipes: each turns one linear into stored tensors, and says what the config files record about it.

def fp8(values):
    return torch.from_numpy(values).to(torch.float8_e4m3fn)


def per_row(weight, scale_dtype):
    """Codes and a scale [out, 1] that is rounded to scale_dtype before it is used."""
    scale = torch.from_numpy(reference.scale_of(np.abs(weight).max(axis=1, keepdims=True))).to(scale_dtype)
    return fp8(reference.round_e4m3(weight / scale.float().numpy())), scale


def per_tensor(weight, scale_dtype, shape):
    scale = torch.tensor(np.abs(weight).max() / 448.0).to(scale_dtype)
    return fp8(reference.round_e4m3(weight / scale.float().numpy())), scale.reshape(shape)


def static_input_scale(amax, dtype, shape):
    # A fifth below what calibration saw: some inputs must saturate, or nobody would notice a missing clamp.
    return torch.tensor(0.8 * amax / 448.0, dtype=torch.float32).to(dtype).reshape(shape)


def fbgemm(name, weight, amax):
    codes, scale = per_row(weight, torch.float32)
    return {name + ".weight": codes, name + ".weight_scale": scale}


def ct_static(name, weight, amax):
    codes, scale = per_tensor(weight, torch.bfloat16, [1])
    return {name + ".weight": codes, name + ".weight_scale": scale,
            name + ".input_scale": static_input_scale(amax, torch.bfloat16, [1])}


def ct_channel(name, weight, amax):
    codes, scale = per_row(weight, torch.bfloat16)
    return {name + ".weight": codes, name + ".weight_scale": scale}


def modelopt(name, weight, amax):
    codes, scale = per_tensor(weight, torch.float32, [])
    tensors = {name + ".weight": codes, name + ".weight_scale": scale,
               name + ".input_scale": static_input_scale(amax, torch.float32, [])}
    if name.endswith(("k_proj", "v_proj")):
        tensors[f"{name}.{name[-6]}_scale"] = torch.tensor(1.0)
    return tensors


def ct_config(weight_strategy, inputs):
    arguments = lambda strategy, dynamic: {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy,
                                           "dynamic": dynamic, "group_size": None, "block_structure": None,
                                           "actorder": None, "observer": None if dynamic else "minmax", "observer_kwargs": {}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head"], "kv_cache_scheme": None, "global_compression_ratio": 1.5,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments(weight_strategy, False),
                                          "input_activations": arguments(*inputs) if inputs else None,
                                          "output_activations": None}}}


def fbgemm_config(config):
    """Meta's recipe: gate, up and down of all layers but the first and the last."""
    last = config["num_hidden_layers"] - 1
    names = [f"model.layers.{i}.mlp.{n}_proj" for i in (0, last) for n in ("down", "gate", "up")]
    names += [f"model.layers.{i}.self_attn.{n}_proj" for i in range(last + 1) for n in "koqv"]
    # Meta's bound is 1200; here it is one that about half of the tokens exceed.
    return {"quant_method": "fbgemm_fp8", "activation_scale_ub": 3.5, "modules_to_not_convert": names}


HF_QUANT_CONFIG = {"producer": {"name": "modelopt", "version": "0.15.1"},
                   "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}

# name: (linear -> tensors, config -> quantization_config or None)
RECIPES = {
    "fbgemm_fp8": (fbgemm, fbgemm_config),
    "ct_static": (ct_static, lambda config: ct_config("tensor", ("tensor", False))),
    "ct_dynamic": (ct_channel, lambda config: ct_config("channel", ("token", True))),
    "ct_weight_only": (ct_channel, lambda config: ct_config("channel", None)),
    "modelopt": (modelopt, lambda config: None),
}


def stored_tensors(config, weights, fmt):
    tensors = {name: torch.from_numpy(values).to(fmt.dtype) for name, values in weights.items()}
    if not fmt.recipe:
        return tensors
    quantize, quantization_config = RECIPES[fmt.recipe]
    skipped = (quantization_config(config) or {}).get("modules_to_not_convert", [])
    amax = input_amax(config, weights)
    for name in reference.block_linears(config):
        if name not in skipped:
            tensors.update(quantize(name, weights[name + ".weight"], amax[name]))
    return tensors


# ---- Directories

SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
                  "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
MERGES = ["Ġ t", "h e", "i n", "Ġ a", "Ġt he", "r e", "o n", "e r", "a t", "Ġ s", "n d", "i s", "o u", "e n", "Ġ o", "Ġ c",
          "in g", "Ġa nd", "Ġ w", "l l", "Ġ f", "e s", "i t", "o r"]
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_alphabet():
    """GPT-2's printable character for every byte, in the order of its token ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def special_ids(vocab_size):
    """Specials are the last ids, as in Llama 3; ids between the merges and them have no token when vocab_size > 288."""
    return {token: vocab_size - len(SPECIAL_TOKENS) + i for i, token in enumerate(SPECIAL_TOKENS)}


def tokenizer_json(vocab_size):
    tokens = byte_alphabet() + [merge.replace(" ", "") for merge in MERGES]
    specials = special_ids(vocab_size)
    bos = "<|begin_of_text|>"
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for t, i in specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            {"type": "TemplateProcessing",
             "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
             "pair": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                      {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
             "special_tokens": {bos: {"id": bos, "ids": [specials[bos]], "tokens": [bos]}}}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": MERGES},
    }


def make_config(fmt, shape):
    ids = special_ids(shape["vocab_size"])
    eos = [ids[token] for token in fmt.eos_token_ids]
    dtype = str(fmt.dtype).removeprefix("torch.")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
              "hidden_act": "silu", "bos_token_id": ids["<|begin_of_text|>"],
              "eos_token_id": eos if len(eos) > 1 else eos[0], "max_position_embeddings": 131072, "rms_norm_eps": 1e-05,
              "tie_word_embeddings": False, "pretraining_tp": 1, "initializer_range": 0.02, "use_cache": True,
              **{key: value for key, value in shape.items() if value is not None}}
    rope = {**LLAMA3_ROPE, "original_max_position_embeddings": fmt.original_context}
    if fmt.rope_parameters:
        config |= {"dtype": dtype, "rope_parameters": {"rope_theta": 500000.0, **rope}}
    else:
        config |= {"torch_dtype": dtype, "rope_theta": 500000.0, "rope_scaling": rope}
    if fmt.recipe:
        quantization = RECIPES[fmt.recipe][1](config)
        if quantization:
            config["quantization_config"] = quantization
    return config


def write_json(path, value, indent=1):
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_tensors(directory, tensors, shards):
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, str(directory / "model.safetensors"), metadata)
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard * len(names) // shards:(shard + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, str(directory / file), metadata)
        weight_map |= {name: file for name in part}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_checkpoint(directory, fmt, base_shape):
    directory.mkdir(parents=True, exist_ok=True)
    shape = base_shape | (fmt.shape if base_shape is SHAPES["tiny"] else {k: v for k, v in fmt.shape.items() if v is None})
    config = make_config(fmt, shape)
    tensors = stored_tensors(config, random_weights(config, fmt.seed), fmt)
    write_tensors(directory, tensors, fmt.shards)
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", {
        "bos_token_id": config["bos_token_id"], "do_sample": True, "eos_token_id": config["eos_token_id"],
        "temperature": 0.6, "top_p": 0.9})
    write_json(directory / "tokenizer.json", tokenizer_json(shape["vocab_size"]), indent=None)
    if fmt.recipe == "modelopt":
        write_json(directory / "hf_quant_config.json", HF_QUANT_CONFIG)
    print(f"{directory}: {sum(f.stat().st_size for f in directory.iterdir())} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    options = parser.parse_args()
    for fmt in FORMATS:
        write_checkpoint(options.out / fmt.name, fmt, SHAPES[options.shape])


if __name__ == "__main__":
    main()
