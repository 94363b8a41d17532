"""Makes sampling/: rows of real logits and what transformers' logits processors leave of them, parameter by parameter.
    python make_sampling_goldens.py --gguf FILE [--out sampling]
Presence and frequency penalty are not in transformers: they are written here as OpenAI's reference defines them."""

import argparse
import json
import pathlib

import numpy as np
import torch
from transformers.generation import logits_process as hf

import transformers_runs as runs
from golden_io import digits, versions
from make_smollm2_goldens import read_gguf
from prompts import PROMPTS

ROWS = ["fox", "capital", "quicksort", "ocean"]
COMPLETION = 24
RESIDUES = 32
LISTED = 64  # survivors that are listed one by one
KNIFE_EDGE = 3e-6


def make_rows(gguf):
    """[(name, prompt ids, completion ids, float32 logits after them)]; the completion repeats itself, as penalties want it."""
    config, weights, tokenizer = read_gguf(gguf)
    model = runs.build(config, {k: torch.from_numpy(v) for k, v in weights.items()}, torch.float32)
    texts = dict(PROMPTS)
    rows = []
    for name in ROWS:
        prompt = tokenizer.encode(texts[name]).ids[-160:]
        completion, _ = runs.greedy(model, prompt, COMPLETION)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0, -1].float()
        rows.append((name, prompt, completion, logits))
        print(name, len(prompt), tokenizer.decode(completion))
    return rows


def presence_and_frequency(scores, completion, presence, frequency):
    counts = torch.zeros_like(scores[0])
    for token in completion:
        counts[token] += 1
    return scores - frequency * counts - presence * (counts > 0)


def leave(row, case):
    """The scores that the processors leave, float32; excluded tokens are -inf. Order: penalties, bias, masks, warpers."""
    _, prompt, completion, logits = row
    ids = torch.tensor([prompt + completion])
    scores = logits[None].clone()
    vocabulary = scores.shape[1]
    if "repetition_penalty" in case:
        scores = hf.RepetitionPenaltyLogitsProcessor(case["repetition_penalty"])(ids, scores)
    scores = presence_and_frequency(scores, completion, case.get("presence_penalty", 0.0), case.get("frequency_penalty", 0.0))
    if "logit_bias" in case:
        scores = hf.SequenceBiasLogitsProcessor([[[token], bias] for token, bias in case["logit_bias"]])(ids, scores)
    if "allowed_token_ids" in case:
        others = sorted(set(range(vocabulary)) - set(case["allowed_token_ids"]))
        scores = hf.SuppressTokensLogitsProcessor(others)(ids, scores)
    if "bad_words" in case:
        scores = hf.NoBadWordsLogitsProcessor(case["bad_words"])(ids, scores)
    if "min_tokens" in case:
        scores = hf.MinNewTokensLengthLogitsProcessor(len(prompt), case["min_tokens"],
                                                      torch.tensor(case["end_token_ids"]))(ids, scores)
    if case.get("temperature", 0.0) == 0.0:
        return scores[0]
    scores = hf.TemperatureLogitsWarper(case["temperature"])(ids, scores)
    if "top_k" in case:
        scores = hf.TopKLogitsWarper(case["top_k"])(ids, scores)
    if "top_p" in case:
        case["top_p"] = between_sums(case, scores[0])
        scores = hf.TopPLogitsWarper(case["top_p"])(ids, scores)
    if "min_p" in case:
        scores = hf.MinPLogitsWarper(case["min_p"])(ids, scores)
    return scores[0]


def between_sums(case, scores):
    """The case's top_p, moved halfway between two sums of probabilities: rounding must not decide which token is the last.
    Where they are too near each other for float32 sums, the case is no golden."""
    sums = torch.cumsum(torch.sort(torch.softmax(scores.double(), -1), descending=True).values, -1).numpy()
    last = min(int(np.searchsorted(sums, case["top_p"])), len(sums) - 1)
    below, above = (sums[last - 1] if last > 0 else 0.0), sums[last]
    if above - below < 2 * KNIFE_EDGE:
        raise ValueError(f"{case['name']}: sums of probabilities around top_p are only {above - below} apart")
    return float(np.float32((below + above) / 2))


def record(row, case):
    case = dict(case)
    scores = leave(row, case)
    out = dict(case, row=ROWS.index(row[0]))
    best = int(scores.argmax())
    if case.get("temperature", 0.0) == 0.0:
        return dict(out, greedy=best)
    probabilities = torch.softmax(scores.double(), -1).numpy()
    survivors = np.flatnonzero(np.isfinite(scores.numpy()))
    listed = sorted(survivors, key=lambda i: (-probabilities[i], i))[:LISTED]
    touched = sorted(set(row[1] + row[2]) | {t for t, _ in case.get("logit_bias", [])})[:LISTED]
    listed += [i for i in touched if np.isfinite(scores[i]) and i not in listed]
    out["survivors"] = [int(np.sum(survivors % RESIDUES == r)) for r in range(RESIDUES)]
    out["masses"] = [digits(probabilities[r::RESIDUES].sum()) for r in range(RESIDUES)]
    out["probabilities"] = [[int(i), digits(probabilities[i])] for i in listed]
    return out


def cases_of(row):
    """Parameters alone and together. Token ids are taken from the row, so that they matter."""
    name, prompt, completion, logits = row
    best = torch.topk(logits, 40).indices.tolist()
    ends = [best[0], best[3]]
    one = {"temperature": 1.0}
    bad_pair = [completion[-1], best[0]]
    bad_triple = [completion[-2], completion[-1], best[1]]
    unmatched = [completion[-1] + 1, best[2]]
    bias = [[best[0], -4.5], [best[5], 3.25], [best[30], 7.0], [7, 1.5], [completion[-1], -30.0]]
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    cases = {
        "temperature_1": {}, "temperature_0.6": {"temperature": 0.6}, "temperature_2.5": {"temperature": 2.5},
        "repetition": {"repetition_penalty": 1.3}, "repetition_reward": {"repetition_penalty": 0.8},
        "presence": {"presence_penalty": 1.5}, "presence_reward": {"presence_penalty": -0.7},
        "frequency": {"frequency_penalty": 0.9}, "all_penalties": penalties,
        "bias": {"logit_bias": bias}, "allowed": {"allowed_token_ids": best[3:30:2] + [11, 5000]},
        "bad_words": {"bad_words": [[best[4]], bad_pair, bad_triple, unmatched]},
        "min_tokens": {"min_tokens": COMPLETION + 1, "end_token_ids": ends},
        "min_tokens_reached": {"min_tokens": COMPLETION, "end_token_ids": ends},
        "top_k_1": {"top_k": 1}, "top_k_50": {"top_k": 50}, "top_k_3000": {"top_k": 3000},
        "top_p_0.3": {"top_p": 0.3}, "top_p_0.9": {"top_p": 0.9}, "top_p_0.98": {"top_p": 0.98},
        "hot_top_p": {"temperature": 1.5, "top_p": 0.7}, "min_p_0.02": {"min_p": 0.02}, "min_p_0.5": {"min_p": 0.5},
        "top_k_top_p": {"temperature": 0.8, "top_k": 40, "top_p": 0.92},
        "top_k_top_p_min_p": {"temperature": 1.4, "top_k": 200, "top_p": 0.98, "min_p": 0.01},
        "everything": {**penalties, "logit_bias": bias, "bad_words": [[best[4]], bad_pair, bad_triple],
                       "min_tokens": 100, "end_token_ids": ends, "temperature": 1.1, "top_k": 120, "top_p": 0.97,
                       "min_p": 0.003},
        "allowed_penalised_top_p": {**penalties, "allowed_token_ids": best + completion, "top_p": 0.8},
        "greedy": {"temperature": 0.0}, "greedy_penalties": {**penalties, "temperature": 0.0},
        "greedy_bias": {"temperature": 0.0, "logit_bias": bias},
        "greedy_bad_words": {"temperature": 0.0, "bad_words": [bad_pair, bad_triple]},
        "greedy_allowed": {"temperature": 0.0, "allowed_token_ids": best[7:20]},
        "greedy_min_tokens": {"temperature": 0.0, "min_tokens": 100, "end_token_ids": ends},
    }
    return [{"name": f"{case}_{name}", **one, **parameters} for case, parameters in cases.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "sampling")
    options = parser.parse_args()
    rows = make_rows(options.gguf)
    options.out.mkdir(parents=True, exist_ok=True)
    logits = np.stack([row[3].numpy() for row in rows]).astype("<f4")
    (options.out / "logits.f32").write_bytes(logits.tobytes())
    compact = lambda value: json.dumps(value, separators=(",", ":"))
    contexts = [{"name": name, "prompt": prompt, "completion": completion} for name, prompt, completion, _ in rows]
    cases = [record(row, case) for row in rows for case in cases_of(row)]
    lines = ["{", '"format":1,', f'"versions":{compact(versions())},', f'"vocab_size":{logits.shape[1]},', '"rows":[',
             ",\n".join(compact(context) for context in contexts), "],", '"cases":[',
             ",\n".join(compact(case) for case in cases), "]", "}", ""]
    (options.out / "cases.json").write_text("\n".join(lines))
    for path in sorted(options.out.iterdir()):
        print(f"{path}: {path.stat().st_size} bytes")
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main()
