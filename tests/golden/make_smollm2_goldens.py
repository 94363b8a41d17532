"""Makes the SmolLM2-135M goldens from its GGUF file: python make_smollm2_goldens.py --gguf FILE [--out smollm2]
Weights come from package `gguf`, are compared with what transformers reads, and never pass through Octet's converter."""

import argparse
import json
import pathlib

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import llama_reference as reference
import transformers_runs as runs
from golden_io import Bound, Golden
from prompts import PROMPTS

STEPS = 32
PREFIXES = 4
BLOCK_NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
               "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
               "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def read_gguf(path):
    """(config, float32 weights by Hugging Face name, tokenizer) of a GGUF Llama."""
    from gguf import GGUFReader, dequantize
    reader = GGUFReader(path)
    field = lambda name: reader.fields[name].contents()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": field("llama.embedding_length"), "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"), "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"), "vocab_size": field("llama.vocab_size"),
        "max_position_embeddings": field("llama.context_length"), "rope_theta": field("llama.rope.freq_base"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"), "tie_word_embeddings": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"), "eos_token_id": field("tokenizer.ggml.eos_token_id"),
    }
    weights = {}
    for tensor in reader.tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if parts[2] == "attn_q" else "num_key_value_heads"]
                values = halves_from_pairs(values, heads)
            name = f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[parts[0]]
        weights[name] = values
    return config, weights, make_tokenizer(field)


def halves_from_pairs(weight, heads):
    """GGUF's row order (pair j of a head at rows 2j, 2j+1) to Hugging Face's (rows j, j + head_dim / 2)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def make_tokenizer(field):
    """SmolLM2's tokenizer from the GGUF's vocabulary and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, types) if kind == control])
    return tokenizer


def check_against_transformers(path, weights):
    """Transformers dequantises and un-permutes the file by its own code: every weight must be the same."""
    path = pathlib.Path(path)
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    theirs = {k: v.numpy() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    if set(theirs) != set(weights):
        raise ValueError(f"tensor names differ: {set(theirs) ^ set(weights)}")
    different = [name for name in weights if not np.array_equal(theirs[name], weights[name])]
    if different:
        raise ValueError(f"weights differ from transformers': {different[:5]}")
    print(f"{len(weights)} tensors equal transformers' own reading of the file, bit for bit; {model.config.rope_parameters}")


def quantized_linears(config, recipe):
    if recipe == "none":
        return set()
    names = reference.block_linears(config)
    if recipe == "ffn":
        first_and_last = ("model.layers.0.", f"model.layers.{config['num_hidden_layers'] - 1}.")
        names = [n for n in names if ".mlp." in n and not n.startswith(first_and_last)]
    return set(names)


def apply_recipe(config, weights, recipe):
    """The weights a conversion with this recipe holds: dequantised FP8, everything else rounded to BF16."""
    fp8 = quantized_linears(config, recipe)
    out = {}
    for name, values in weights.items():
        if name.removesuffix(".weight") in fp8:
            codes, scale = reference.quantize_rows(values)
            out[name] = codes * scale
        else:
            out[name] = reference.round_bf16(values)
    return out


def make_variant(config, weights, prompts, drafts, recipe, fp8_activations, out):
    """drafts: {prompt name: a guess of its continuation}, replaced by what this variant says."""
    variant = recipe + ("_w8a8" if fp8_activations else "")
    print(f"{variant}:")
    stored = apply_recipe(config, weights, recipe)
    scheme = reference.ActivationScheme("dynamic", upper_bound=1200.0)
    fp8 = quantized_linears(config, recipe)
    schemes = {n: scheme for n in fp8} if fp8_activations else {}
    state = {k: torch.from_numpy(v) for k, v in stored.items()}
    float32 = runs.build(config, state, torch.float32, schemes)
    bfloat16 = runs.build(config, state, torch.bfloat16, schemes)
    linears = {n: reference.Linear(stored[n + ".weight"], schemes.get(n, reference.ActivationScheme()),
                                   reference.is_row_parallel(n), n in fp8) for n in reference.block_linears(config)}
    independent = reference.Llama(config, stored, linears)
    rounded, _ = reference.rounded_twins(independent)
    golden = Golden("SmolLM2-135M-Instruct", variant, "fp8" if fp8_activations else "bf16",
                    "transformers float32", ["transformers_bfloat16", "numpy_float32", "numpy_rounded"])
    for name, text, ids in prompts:
        continuation, rows = runs.greedy(float32, ids, STEPS, draft=drafts.get(name))
        drafts[name] = continuation
        sequence = ids + continuation
        golden.add({"name": name, "text": text, "token_ids": ids}, continuation, rows,
                   {"transformers_bfloat16": runs.log_probs(bfloat16, sequence),
                    "numpy_float32": independent.log_probs(sequence), "numpy_rounded": rounded.log_probs(sequence)},
                   PREFIXES)
    golden.write(out / f"{variant}.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "smollm2")
    parser.add_argument("--variants", default="none,ffn,all,ffn_w8a8,all_w8a8")
    options = parser.parse_args()
    config, weights, tokenizer = read_gguf(options.gguf)
    check_against_transformers(options.gguf, weights)
    prompts = [(name, text, tokenizer.encode(text).ids) for name, text in PROMPTS]
    for name, text, ids in prompts:
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise ValueError(f"{name} does not survive tokenising")
    print("prompt lengths:", [len(ids) for _, _, ids in prompts])
    drafts = {}
    for variant in options.variants.split(","):
        earlier = options.out / f"{variant}.json"
        if earlier.exists():
            drafts = {p["name"]: p["continuation"] for p in json.loads(earlier.read_text())["prompts"]}
        make_variant(config, weights, prompts, drafts, variant.removesuffix("_w8a8"), variant.endswith("_w8a8"), options.out)


if __name__ == "__main__":
    main()
