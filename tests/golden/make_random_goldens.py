"""Makes the goldens of the random checkpoints: python make_random_goldens.py [CHECKPOINTS] [OUT]
The reference is llama_reference.py (numpy); transformers over the same weights checks it and gives the bfloat16 bounds."""

import argparse
import pathlib
from dataclasses import replace

import numpy as np
import torch

import llama_reference as reference
import transformers_runs as runs
from golden_io import Golden

LENGTHS = [1, 2, 3, 7, 16, 17, 64, 100, 255, 256, 257, 300, 511, 600]
STEPS = 16
PREFIXES = 8


def random_prompts(vocab_size):
    rng = np.random.default_rng(2024)
    return [{"name": f"random_{n}", "token_ids": rng.integers(0, vocab_size, n).tolist()} for n in LENGTHS]


def wrong_twins(model):
    """Mistakes that a comparison with `rounded` must be able to see: {name: the model with the mistake}."""
    def twin(change, config=None):
        linears = {name: change(linear) for name, linear in model.linears.items()}
        return reference.Llama(config or model.config, model.tensors, linears, rounded=True)

    schemes = [linear.activations for linear in model.linears.values() if linear.activations.kind != "none"]
    theta = dict(model.config, rope_scaling=None, rope_parameters={"rope_theta": 500000.0})
    wrong = {"wrong: no rope scaling": twin(lambda l: l, theta)}
    if schemes:
        wrong["wrong: bf16 activations"] = twin(lambda l: replace(l, activations=reference.ActivationScheme()))
    if any(scheme.kind == "dynamic" for scheme in schemes):
        wrong["wrong: one scale per row"] = twin(lambda l: replace(l, row_parallel=False))
    if any(np.isfinite(scheme.upper_bound) for scheme in schemes):
        wrong["wrong: no upper bound"] = twin(
            lambda l: replace(l, activations=replace(l.activations, upper_bound=np.inf)))
    return wrong


def make_variant(directory, fp8_activations, out, prompts=None):
    variant = directory.name + ("_w8a8" if fp8_activations else "")
    print(f"{variant}:")
    model = reference.load(directory, fp8_activations)
    weights = model.tensors | {f"{name}.weight": linear.weight for name, linear in model.linears.items()}
    state = {name: torch.from_numpy(values) for name, values in weights.items()}
    schemes = {name: linear.activations for name, linear in model.linears.items()}
    float32 = runs.build(model.config, state, torch.float32, schemes)
    bfloat16 = runs.build(model.config, state, torch.bfloat16, schemes)
    rounded, exact_sums = reference.rounded_twins(model)
    wrong = wrong_twins(rounded)
    golden = Golden(directory.name, variant, "fp8" if fp8_activations else "bf16", "numpy float32",
                    ["transformers_bfloat16", "transformers_float32"], prompt_logprobs=False)
    for prompt in prompts or random_prompts(model.config["vocab_size"]):
        continuation, rows = runs.greedy(float32, prompt["token_ids"], STEPS, model.log_probs)
        sequence = prompt["token_ids"] + continuation
        golden.add(prompt, continuation, rows, {"transformers_bfloat16": runs.log_probs(bfloat16, sequence),
                                                "transformers_float32": runs.log_probs(float32, sequence)},
                   PREFIXES, rounded.log_probs(sequence),
                   {"float64_sums": exact_sums.log_probs(sequence), "float32_reference": rows,
                    **{name: twin.log_probs(sequence) for name, twin in wrong.items()}})
    golden.write(out / f"{variant}.json")


def main():
    here = pathlib.Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="?", type=pathlib.Path, default=here / "random")
    parser.add_argument("out", nargs="?", type=pathlib.Path, default=here / "random_goldens")
    options = parser.parse_args()
    for directory in sorted(d for d in options.checkpoints.iterdir() if (d / "config.json").exists()):
        make_variant(directory, False, options.out)
        quantizes = any(linear.activations.kind != "none" for linear in reference.load(directory, True).linears.values())
        if quantizes:
            make_variant(directory, True, options.out)


if __name__ == "__main__":
    main()
