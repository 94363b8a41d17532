#!/usr/bin/env python3
"""Writes the goldens of gguf_test and converter_test with packages gguf, numpy, torch and safetensors.

gguf_types.gguf        one tensor of every type that Octet reads, random bytes where a type has codes
gguf_types.bin         gguf.dequantize() of each, FP32, in the order of their names
tiny_llama.gguf        a three-layer Llama as convert_hf_to_gguf.py would write it, types mixed
tiny_llama_bf16.safetensors   its weights in Hugging Face's row order, BF16
tiny_llama_fp8.safetensors    its block linears as e4m3 with F32 row scales, by torch

None of it passes through Octet. Run from anywhere: the files land beside this script.
"""
import pathlib

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve().parent
TYPE = gguf.GGMLQuantizationType
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 32, 3, 4, 2, 8, 32


def random_blocks(rng, kind, rows, columns):
    """Random codes under scales of every size a half can have, subnormal and negative ones included."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, columns // elements, size), dtype=np.uint8)
    halves = 2 if kind == TYPE.Q4_1 else 1
    scales = rng.integers(0, 0x7C00, (rows, columns // elements, halves)).astype(np.uint16)
    scales |= rng.integers(0, 2, scales.shape).astype(np.uint16) << 15
    scales[0, 0] = 1  # the smallest subnormal
    raw[:, :, : 2 * halves] = scales.view(np.uint8).reshape(rows, -1, 2 * halves)
    return raw.reshape(rows, -1)


def write_types():
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(HERE / "gguf_types.gguf", "test")
    expected = []
    floats = (rng.standard_normal((3, 64)) * 10.0 ** rng.integers(-6, 5, (3, 64))).astype(np.float32)
    bf16 = rng.integers(0, 0x7F80, (3, 64)).astype(np.uint16)
    tensors = {
        "bf16": (bf16.view(np.uint8), TYPE.BF16),
        "f16": (rng.integers(0, 0x7C00, (3, 64)).astype(np.uint16).view(np.float16), TYPE.F16),
        "f32": (floats, TYPE.F32),
        "q4_0": (random_blocks(rng, TYPE.Q4_0, 5, 64), TYPE.Q4_0),
        "q4_1": (random_blocks(rng, TYPE.Q4_1, 5, 64), TYPE.Q4_1),
        "q8_0": (random_blocks(rng, TYPE.Q8_0, 5, 64), TYPE.Q8_0),
    }
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
        expected.append(gguf.dequantize(data, kind).astype(np.float32).reshape(-1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (HERE / "gguf_types.bin").write_bytes(np.concatenate(expected).tobytes())


def to_gguf_order(weights, heads):
    """The permutation of convert_hf_to_gguf.py: halves to pairs."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)


def from_gguf_order(weights, heads):
    return weights.reshape(heads, weights.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weights.shape)


def byte_alphabet():
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [table[b] for b in printable + others]


def add_tokenizer(writer):
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["h e", "l l", "he ll", "hell o", "\u0120 w", "o r", "\u0120w or"]
    tokens = specials + byte_alphabet() + [m.replace(" ", "") for m in merges]
    tokens.append("[PAD]")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(specials) + [1] * (len(tokens) - len(specials) - 1) + [5])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% endfor %}")
    return len(tokens)


def write_llama():
    rng = np.random.default_rng(2)
    writer = gguf.GGUFWriter(HERE / "tiny_llama.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    vocab = add_tokenizer(writer)
    hf = {}

    def add(name, hf_name, rows, columns, kind, heads=None):
        values = (rng.standard_normal((rows, columns) if columns else rows) * 0.3).astype(np.float32)
        if heads:
            values = to_gguf_order(values, heads)
        data = gguf.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        stored = gguf.dequantize(data, kind).astype(np.float32).reshape(values.shape)
        hf[hf_name] = from_gguf_order(stored, heads) if heads else stored

    kv_rows = KV_HEADS * HEAD_DIM
    add("token_embd.weight", "model.embed_tokens.weight", vocab, HIDDEN, TYPE.Q8_0)
    for i in range(LAYERS):
        gg, to = f"blk.{i}.", f"model.layers.{i}."
        add(gg + "attn_norm.weight", to + "input_layernorm.weight", HIDDEN, 0, TYPE.F32)
        add(gg + "attn_q.weight", to + "self_attn.q_proj.weight", HIDDEN, HIDDEN, TYPE.Q8_0, HEADS)
        add(gg + "attn_k.weight", to + "self_attn.k_proj.weight", kv_rows, HIDDEN, TYPE.Q4_1, KV_HEADS)
        add(gg + "attn_v.weight", to + "self_attn.v_proj.weight", kv_rows, HIDDEN, TYPE.Q4_0)
        add(gg + "attn_output.weight", to + "self_attn.o_proj.weight", HIDDEN, HIDDEN, TYPE.F16)
        add(gg + "ffn_norm.weight", to + "post_attention_layernorm.weight", HIDDEN, 0, TYPE.F32)
        add(gg + "ffn_gate.weight", to + "mlp.gate_proj.weight", FFN, HIDDEN, TYPE.BF16)
        add(gg + "ffn_up.weight", to + "mlp.up_proj.weight", FFN, HIDDEN, TYPE.F32)
        add(gg + "ffn_down.weight", to + "mlp.down_proj.weight", HIDDEN, FFN, TYPE.Q4_1)
    add("output_norm.weight", "model.norm.weight", HIDDEN, 0, TYPE.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in hf.items()}
    save_file({n: t.to(torch.bfloat16) for n, t in tensors.items()}, HERE / "tiny_llama_bf16.safetensors")
    fp8 = {}
    for name, weights in tensors.items():
        if "_proj" not in name:
            continue
        scale = torch.clamp(weights.abs().amax(1, keepdim=True) / 448, min=1 / (448 * 512))
        fp8[name] = torch.clamp(weights * (1 / scale), -448, 448).to(torch.float8_e4m3fn)
        fp8[name.removesuffix("weight") + "weight_scale"] = scale
    save_file(fp8, HERE / "tiny_llama_fp8.safetensors")


if __name__ == "__main__":
    write_types()
    write_llama()
