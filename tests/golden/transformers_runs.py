"""Transformers' LlamaForCausalLM over given weights, in float32 or in its own bfloat16, with FP8 activations by hooks.
The quantisers here are torch's float8 casts, on purpose not those of llama_reference.py: one checks the other."""

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM


def slice_ends(columns, slices):
    return [(s + 1) * columns // slices // 2 * 2 for s in range(slices)]


def round_e4m3(x):
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()


def fake_quantize(x, scheme, group_ends):
    """x after quantising (from its BF16 value) and dequantising, as float32."""
    x = x.to(torch.bfloat16).float()
    if scheme.kind == "static":
        scale = torch.tensor(scheme.scale, dtype=torch.float32)
        return round_e4m3(x * (1.0 / scale)) * scale
    groups, begin = [], 0
    for end in group_ends:
        group = x[..., begin:end]
        amax = group.abs().amax(dim=-1, keepdim=True).clamp(max=scheme.upper_bound)
        scale = (amax / 448.0).clamp(min=1.0 / (448.0 * 512.0))
        groups.append(round_e4m3(group * (1.0 / scale)) * scale)
        begin = end
    return torch.cat(groups, dim=-1)


def build(config, state_dict, dtype, schemes=None):
    """state_dict: float32 weights by Hugging Face name. schemes: module path -> ActivationScheme.

    A linear with a scheme multiplies in float32 and rounds its result to dtype, as an FP8 GEMM with FP32 accumulation does."""
    values = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype", "dtype")}
    hf_config = LlamaConfig.from_dict(values)
    hf_config._attn_implementation = "eager"
    model = LlamaForCausalLM(hf_config).float()
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"} or (missing and not config.get("tie_word_embeddings")):
        raise ValueError(f"state dict: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    # model.to() would also round RoPE's frequencies, which loading a checkpoint in bfloat16 does not do.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.eval()
    for name, scheme in (schemes or {}).items():
        if scheme.kind != "none":
            _quantize_input(model.get_submodule(name), name, scheme, state_dict[name + ".weight"], hf_config)
    return model


def _quantize_input(module, name, scheme, weight, config):
    slices = config.num_key_value_heads if name.endswith(("o_proj", "down_proj")) else 1
    ends = slice_ends(weight.shape[1], slices) if slices > 1 else [weight.shape[1]]

    def forward(x):
        return F.linear(fake_quantize(x, scheme, ends), weight).to(x.dtype)

    module.forward = forward


@torch.inference_mode()
def log_probs(model, token_ids):
    """[tokens, vocab_size] float32 as numpy: row i is the distribution of the token after token_ids[:i + 1]."""
    logits = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1).numpy()


@torch.inference_mode()
def _greedy_from(model, token_ids, steps):
    cache, tokens, out = None, token_ids, []
    for _ in range(steps):
        result = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
        cache, tokens = result.past_key_values, [int(result.logits[0, -1].argmax())]
        out += tokens
    return out


def greedy(model, token_ids, steps, one_pass=None, draft=None):
    """(tokens, log-probs [prompt + steps, vocab_size]): the `steps` most likely tokens, past any end token.

    Token by token and in one pass, float32 sums differ in their last bits, and a quantised activation may turn that into
    another token. So the one pass has the last word: the tokens are changed until it agrees with every one of them.
    one_pass(token_ids) -> log-probs may be another implementation of the same model. draft: a guess of the tokens; a good one
    saves time, none changes the outcome."""
    one_pass = one_pass or (lambda ids: log_probs(model, ids))
    out = draft or _greedy_from(model, token_ids, steps)
    while True:
        rows = one_pass(token_ids + out)
        best = rows[len(token_ids) - 1:-1].argmax(axis=1).tolist()
        if best == out:
            return out, rows
        agreed = next(k for k in range(steps) if best[k] != out[k])
        out = out[:agreed] + [best[agreed]]
        out += _greedy_from(model, token_ids + out, steps - len(out)) if len(out) < steps else []
