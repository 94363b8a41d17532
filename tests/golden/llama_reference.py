"""An independent Llama in numpy float32: the textbook forward pass and the FP8 recipes, from the formats' descriptions.
Shares nothing with the C++ engine, and reads checkpoints only through the `safetensors` package."""

import json
import pathlib
from dataclasses import dataclass, field, replace

import numpy as np

E4M3_MAX = np.float32(448.0)
SCALE_FLOOR = np.float32(1.0 / (448.0 * 512.0))


def slice_ends(columns, slices):
    """Where each of the `slices` column groups ends: s*n/S rounded down to even."""
    return [(s + 1) * columns // slices // 2 * 2 for s in range(slices)]


def round_bf16(x):
    """float32 to the nearest bfloat16 (ties to even), as float32. Finite values only."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def round_e4m3(x):
    """float32 to the nearest e4m3fn value (ties to even) after clamping to +-448, as float32."""
    x = np.clip(x, -E4M3_MAX, E4M3_MAX).astype(np.float64)
    _, exponent = np.frexp(x)  # x = m * 2^exponent, 0.5 <= |m| < 1
    quantum = np.ldexp(1.0, np.maximum(exponent - 1, -6) - 3)
    return (np.rint(x / quantum) * quantum).astype(np.float32)


def scale_of(amax):
    """The scale of a row whose greatest magnitude is amax."""
    return np.maximum(amax.astype(np.float32) / E4M3_MAX, SCALE_FLOOR).astype(np.float32)


def quantize_rows(weight):
    """Meta's recipe for weights: (codes' values [out, in], scale [out, 1])."""
    scale = scale_of(np.abs(weight).max(axis=1, keepdims=True))
    return round_e4m3(weight * (np.float32(1.0) / scale)), scale


@dataclass
class ActivationScheme:
    """How a linear layer's input is quantised. kind: "none", "dynamic" (per token and column group) or "static"."""
    kind: str = "none"
    upper_bound: float = np.inf
    scale: float = 1.0

    def apply(self, x, group_ends):
        """x [tokens, in] as it is after quantising and dequantising. The recipe is defined on BF16 inputs."""
        if self.kind == "none":
            return x
        x = round_bf16(x)
        if self.kind == "static":
            scale = np.float32(self.scale)
            return round_e4m3(x * (np.float32(1.0) / scale)) * scale
        out, begin = np.empty_like(x), 0
        for end in group_ends:
            group = x[:, begin:end]
            amax = np.minimum(np.abs(group).max(axis=1, keepdims=True), np.float32(self.upper_bound))
            scale = scale_of(amax)
            out[:, begin:end] = round_e4m3(group * (np.float32(1.0) / scale)) * scale
            begin = end
        return out


@dataclass
class Linear:
    weight: np.ndarray  # [out, in], dequantised
    activations: ActivationScheme = field(default_factory=ActivationScheme)
    row_parallel: bool = False  # o_proj and down_proj: one dynamic scale per token and slice
    is_fp8: bool = False

    def in_bf16(self):
        """The layer as BF16 memory holds it. FP8 codes are exact there and their scales stay FP32."""
        return self if self.is_fp8 else replace(self, weight=round_bf16(self.weight))

    def __call__(self, x, slices, accumulator=np.float32):
        groups = slice_ends(x.shape[1], slices) if self.row_parallel else [x.shape[1]]
        x = self.activations.apply(x, groups)
        return np.matmul(x, self.weight.T, dtype=accumulator).astype(np.float32, copy=False)


def inverse_frequencies(config):
    """RoPE frequencies [head_dim / 2], with "llama3" scaling where the config asks for it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    d = head_dim(config)
    inv = 1.0 / theta ** (np.arange(0, d, 2, dtype=np.float64) / d)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3":
        factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
        original = rope["original_max_position_embeddings"]
        wavelength = 2 * np.pi / inv
        blend = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
        inv = (1 - blend) * inv / factor + blend * inv
    elif kind != "default":
        raise ValueError(f"rope type {kind}")
    return inv.astype(np.float32)


def head_dim(config):
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


class Llama:
    """tensors: the norms, embeddings and head by their Hugging Face names; linears: block linears by module path.

    rounded: keep the residual stream, the norms' results, q, k, v, the attention's result and silu(gate) * up in BF16.
    accumulator: of the linear layers' sums; float64 shows how much the order of float32 sums can matter."""

    def __init__(self, config, tensors, linears, rounded=False, accumulator=np.float32):
        self.round = round_bf16 if rounded else lambda x: x
        self.accumulator = accumulator
        self.config, self.tensors, self.linears = config, tensors, linears
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = head_dim(config)
        self.inv_freq = inverse_frequencies(config)
        self.amax = None  # a dict here records the greatest input of each linear layer

    def _linear(self, name, x):
        if self.amax is not None:
            self.amax[name] = max(self.amax.get(name, 0.0), float(np.abs(x).max()))
        return self.linears[name](x, self.kv_heads, self.accumulator)

    def _norm(self, x, name):
        mean_square = (x * x).mean(axis=1, keepdims=True, dtype=np.float32)
        return self.round(x / np.sqrt(mean_square + np.float32(self.config["rms_norm_eps"])) * self.tensors[name])

    def _rotate(self, x):
        """x [tokens, heads, head_dim]; element j pairs with j + head_dim / 2."""
        angle = (np.arange(x.shape[0], dtype=np.float32)[:, None] * self.inv_freq).astype(np.float64)
        cos, sin = np.cos(angle).astype(np.float32)[:, None], np.sin(angle).astype(np.float32)[:, None]
        a, b = np.split(x, 2, axis=2)
        return self.round(np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2))

    def _attention(self, x, prefix):
        tokens = x.shape[0]
        q = self._rotate(self._linear(prefix + "q_proj", x).reshape(tokens, self.heads, self.head_dim))
        k = self._rotate(self._linear(prefix + "k_proj", x).reshape(tokens, self.kv_heads, self.head_dim))
        v = self.round(self._linear(prefix + "v_proj", x)).reshape(tokens, self.kv_heads, self.head_dim)
        future = np.triu(np.full((tokens, tokens), -np.inf, dtype=np.float32), 1)
        out = np.empty_like(q)
        for head in range(self.heads):
            kv = head // (self.heads // self.kv_heads)
            scores = q[:, head] @ k[:, kv].T / np.float32(np.sqrt(self.head_dim)) + future
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, kv]
        return self._linear(prefix + "o_proj", self.round(out.reshape(tokens, -1)))

    def _feed_forward(self, x, prefix):
        gate, up = self._linear(prefix + "gate_proj", x), self._linear(prefix + "up_proj", x)
        return self._linear(prefix + "down_proj", self.round(gate / (1 + np.exp(-gate)) * up))

    def log_probs(self, token_ids):
        """[tokens, vocab_size]: row i is the distribution of the token after token_ids[:i + 1]."""
        x = self.round(self.tensors["model.embed_tokens.weight"][np.asarray(token_ids)])
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            x = self.round(x + self._attention(self._norm(x, layer + "input_layernorm.weight"), layer + "self_attn."))
            x = self.round(x + self._feed_forward(self._norm(x, layer + "post_attention_layernorm.weight"), layer + "mlp."))
        head = self.tensors.get("lm_head.weight", self.tensors["model.embed_tokens.weight"])
        logits = self._norm(x, "model.norm.weight") @ head.T
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def block_linears(config):
    return [f"model.layers.{i}.{name}" for i in range(config["num_hidden_layers"]) for name in LINEARS]


def is_row_parallel(name):
    return name.endswith(("o_proj", "down_proj"))


def read_tensors(directory):
    """Every tensor of a checkpoint directory, as torch tensors in their stored dtypes."""
    from safetensors.torch import load_file
    directory = pathlib.Path(directory)
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors = {}
    for file in files:
        tensors.update(load_file(str(directory / file)))
    return tensors


def activation_scheme(directory, config):
    """The checkpoint's own activation recipe as a function of a linear's stored input_scale (or None)."""
    quantization = config.get("quantization_config")
    if quantization is None:
        separate = pathlib.Path(directory) / "hf_quant_config.json"
        quantization = json.loads(separate.read_text())["quantization"] if separate.exists() else {}
    method = quantization.get("quant_method", "modelopt" if "quant_algo" in quantization else "")
    if method == "fbgemm_fp8":
        bound = quantization["activation_scale_ub"]
        return lambda input_scale: ActivationScheme("dynamic", upper_bound=bound)
    if method == "modelopt":
        return lambda input_scale: ActivationScheme("static", scale=input_scale)
    if method == "compressed-tensors":
        inputs = quantization["config_groups"]["group_0"]["input_activations"]
        if inputs is None:
            return lambda input_scale: ActivationScheme()
        if inputs["dynamic"]:
            return lambda input_scale: ActivationScheme("dynamic")
        return lambda input_scale: ActivationScheme("static", scale=input_scale)
    return lambda input_scale: ActivationScheme()


def rounded_twins(model):
    """(the model with BF16 rounding points and weights, the same with float64 sums)."""
    tensors = {name: round_bf16(values) if values.ndim > 1 else values for name, values in model.tensors.items()}
    linears = {name: linear.in_bf16() for name, linear in model.linears.items()}
    return tuple(Llama(model.config, tensors, linears, True, accumulator) for accumulator in (np.float32, np.float64))


def load(directory, quantize_activations=False):
    """A Llama from a Hugging Face directory: W8A16, or W8A8 as the checkpoint's recipe says."""
    config = json.loads((pathlib.Path(directory) / "config.json").read_text())
    raw = read_tensors(directory)
    scheme = activation_scheme(directory, config)
    as_float = lambda name: raw[name].float().numpy()
    linears = {}
    for name in block_linears(config):
        linear = Linear(as_float(name + ".weight"), row_parallel=is_row_parallel(name))
        if name + ".weight_scale" in raw:
            linear.is_fp8 = True
            linear.weight = linear.weight * as_float(name + ".weight_scale").reshape(-1, 1)
            if quantize_activations:
                stored = as_float(name + ".input_scale").item() if name + ".input_scale" in raw else None
                linear.activations = scheme(stored)
        linears[name] = linear
    others = {name: as_float(name) for name in raw if name.endswith(
        ("layernorm.weight", "model.norm.weight", "embed_tokens.weight", "lm_head.weight"))}
    return Llama(config, others, linears)
