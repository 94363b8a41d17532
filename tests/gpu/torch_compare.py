"""The work of Octet's kernels through PyTorch, on the same card in the same run as launch/gpu_check: reading of memory,
FP8 matrices by one token (torch.compile, weights only) and by thousands (torch._scaled_mm, row-wise scales), attention
(scaled_dot_product_attention). Shapes: a rank of eight of Llama 3.1 405B.

    python torch_compare.py [--json FILE] [--rounds 20]

Prints medians, one line each, and writes them as one flat JSON object; null is what this PyTorch or GPU cannot do."""

import argparse
import json
import statistics
import sys

import torch
import torch.nn.functional as F

# [out_features, in_features] of a rank of eight of 405B.
SHAPES = {"qkv": (2304, 16384), "o": (16384, 2048), "gate_up": (13312, 16384), "down": (16384, 6656)}
HEADS, KV_HEADS, HEAD_DIM = 16, 1, 128
DECODE_SEQUENCES, DECODE_CONTEXT, PREFILL_TOKENS = 64, 4096, 4096
GEMM_TOKENS = 4096
# More than any GPU's cache holds, so that every round reads memory.
COLD_BYTES = 1 << 30


class Timer:
    """Medians of device times of a callable that is given the number of its round."""

    def __init__(self, rounds):
        self.rounds = rounds

    def seconds(self, work):
        for i in range(3):
            work(i)
        times = []
        for i in range(self.rounds):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work(i)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)


def random_e4m3(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)


def read_bandwidth(timer):
    """Bytes per second of a sum over a GiB: what reading alone can reach."""
    values = torch.ones(COLD_BYTES // 4, device="cuda", dtype=torch.float32)
    total = torch.compile(lambda x: x.sum())
    return COLD_BYTES / timer.seconds(lambda i: total(values))


def matvec(timer, out_features, in_features):
    """Bytes of FP8 weights per second, by one token in BF16; over enough copies in turns to find no cache warm."""
    copies = max(2, COLD_BYTES // (out_features * in_features))
    weights = [random_e4m3(out_features, in_features) for _ in range(copies)]
    scale = torch.rand(out_features, device="cuda", dtype=torch.float32)
    x = torch.randn(in_features, device="cuda", dtype=torch.bfloat16)

    @torch.compile(mode="max-autotune-no-cudagraphs")
    def multiply(weight, scale, x):
        return ((weight.to(torch.bfloat16) * x).sum(dim=1, dtype=torch.float32) * scale).to(torch.bfloat16)

    return out_features * in_features / timer.seconds(lambda i: multiply(weights[i % copies], scale, x))


def scaled_mm(timer, out_features, in_features):
    """Floating-point operations per second of e4m3 times e4m3, a scale for each token and each output."""
    weight = random_e4m3(out_features, in_features).t()
    x = random_e4m3(GEMM_TOKENS, in_features)
    of_tokens = torch.rand(GEMM_TOKENS, 1, device="cuda", dtype=torch.float32)
    of_outputs = torch.rand(1, out_features, device="cuda", dtype=torch.float32)
    work = lambda i: torch._scaled_mm(x, weight, scale_a=of_tokens, scale_b=of_outputs, out_dtype=torch.bfloat16,
                                      use_fast_accum=True)
    return 2 * GEMM_TOKENS * out_features * in_features / timer.seconds(work)


def attention(timer, sequences, queries, context):
    """Seconds of one layer's attention of a rank."""
    query = torch.randn(sequences, HEADS, queries, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    keys = torch.randn(sequences, KV_HEADS, context, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    values = torch.randn_like(keys)
    work = lambda i: F.scaled_dot_product_attention(query, keys, values, is_causal=queries == context, enable_gqa=True)
    return timer.seconds(work)


def measured(name, work, results):
    """Notes work() under name, or null and why not: one missing feature must not cost the other figures."""
    try:
        results[name] = float(f"{work():.5g}")
        print(f"{name}: {results[name]:g}", flush=True)
    except Exception as error:  # whatever PyTorch raises: it has no common type
        results[name] = None
        print(f"{name}: not measured: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)
    torch.cuda.empty_cache()
    return results[name]


def compare(rounds):
    timer, results = Timer(rounds), {"torch": torch.__version__, "device": torch.cuda.get_device_name()}
    read = measured("read_gb_per_s", lambda: read_bandwidth(timer) / 1e9, results)
    of_read = lambda bytes_per_second: 100 * bytes_per_second / 1e9 / read
    for name, shape in SHAPES.items():
        measured(f"matvec_{name}_percent_of_read", lambda: of_read(matvec(timer, *shape)), results)
    for name, shape in SHAPES.items():
        measured(f"scaled_mm_{name}_{GEMM_TOKENS}_tflops", lambda: scaled_mm(timer, *shape) / 1e12, results)
    cache = 2 * DECODE_SEQUENCES * DECODE_CONTEXT * KV_HEADS * HEAD_DIM * 2
    measured("sdpa_decode_percent_of_read",
             lambda: of_read(cache / attention(timer, DECODE_SEQUENCES, 1, DECODE_CONTEXT)), results)
    # Causal: half of the scores.
    operations = 2 * 2 * HEADS * HEAD_DIM * PREFILL_TOKENS * PREFILL_TOKENS / 2
    measured("sdpa_prefill_tflops",
             lambda: operations / attention(timer, 1, PREFILL_TOKENS, PREFILL_TOKENS) / 1e12, results)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch_compare: PyTorch sees no GPU")
    results = compare(options.rounds)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
