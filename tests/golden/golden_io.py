"""What a golden file holds and how it is written; see README.md for the meaning of each field."""

import json
import pathlib
import platform

import numpy as np

TOP = 8
FULL_STEPS = 16  # of a continuation; later steps keep the first two tokens


class Bound:
    """Mean and maximum |difference| gathered over many values."""

    def __init__(self):
        self.sum, self.max, self.count = 0.0, 0.0, 0

    def add(self, a, b):
        difference = np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).ravel()
        if difference.size:
            self.sum += difference.sum()
            self.max = max(self.max, difference.max())
            self.count += difference.size

    def mean(self):
        return self.sum / max(self.count, 1)

    def as_json(self):
        return {"mean": float(f"{self.mean():.6g}"), "max": float(f"{self.max:.6g}"), "count": self.count}

    def __str__(self):
        return f"mean {self.mean():.6f} max {self.max:.6f} of {self.count}"


def top(row, count=TOP):
    """Ids of the greatest values, ties to the smaller id."""
    candidates = np.argpartition(-row, min(4 * count, row.size - 1))[:4 * count]
    return sorted(candidates.tolist(), key=lambda i: (-row[i], i))[:count]


def digits(value, count=9):
    return float(f"{float(value):.{count}g}")


def prefix_lengths(prompt_length, count):
    """Up to `count` lengths inside the prompt, spread evenly, the first one 1."""
    if prompt_length <= 1:
        return []
    return sorted({1 + i * (prompt_length - 1) // count for i in range(count)} - {prompt_length})


class Golden:
    """Gathers one variant: a reference's log-probs and how far other runs of the same weights are from it."""

    def __init__(self, model, variant, activations, reference, runs, prompt_logprobs=True):
        self.prompt_logprobs = prompt_logprobs
        self.data = {"format": 1, "model": model, "variant": variant, "activations": activations,
                     "reference": reference, "bounds": {}, "versions": versions(), "prompts": []}
        self.bounds = {run: {"points": Bound(), "prompts": Bound(), "other_top": 0} for run in runs}
        self.rounded_bounds = {}

    def add(self, prompt, continuation, reference, runs, prefixes, rounded=None, near_rounded={}):
        """prompt: {"name", "text"?, "token_ids"}. The others are log-probs [tokens, vocab] of prompt + continuation: the
        float32 reference, runs to compare with it, and if given the reference with BF16 rounding points and runs near that."""
        ids = prompt["token_ids"]
        sequence = ids + continuation
        rows = np.arange(len(ids) - 1)
        targets = np.asarray(ids[1:], dtype=np.int64)
        points = []
        for length in prefix_lengths(len(ids), prefixes) + [len(ids) + k for k in range(len(continuation))]:
            row = reference[length - 1]
            best = top(row, TOP if length < len(ids) + FULL_STEPS else 2)
            points.append({"prefix": length, "top": [[i, digits(row[i])] for i in best],
                           "margin": digits(row[best[0]] - row[best[1]])})
            if rounded is not None:
                points[-1]["rounded"] = [digits(rounded[length - 1][i], 7) for i in best]
            for name, run in near_rounded.items():
                self.rounded_bounds.setdefault(name, Bound()).add(rounded[length - 1][best], run[length - 1][best])
            if length >= len(ids) and best[0] != sequence[length]:
                raise ValueError(f"{prompt['name']}: the continuation is not greedy at {length}")
            for name, run in runs.items():
                self.bounds[name]["points"].add(row[best], run[length - 1][best])
                self.bounds[name]["other_top"] += int(top(run[length - 1])[0] != best[0])
        for name, run in runs.items():
            self.bounds[name]["prompts"].add(reference[rows, targets], run[rows, targets])
        entry = {**prompt, "continuation": continuation}
        if self.prompt_logprobs:
            entry["prompt_logprobs"] = [digits(v) for v in reference[rows, targets]]
        self.data["prompts"].append({**entry, "points": points})

    def write(self, path):
        for name, bound in self.bounds.items():
            self.data["bounds"][name] = {"points": bound["points"].as_json(), "prompts": bound["prompts"].as_json(),
                                         "other_top": bound["other_top"]}
            print(f"  {name:24} points: {bound['points']}; prompts: {bound['prompts']}; "
                  f"other top-1: {bound['other_top']}")
        if self.rounded_bounds:
            self.data["bounds"]["from_rounded"] = {name: bound.as_json() for name, bound in self.rounded_bounds.items()}
        for name, bound in self.rounded_bounds.items():
            print(f"  from rounded: {name:24} {bound}", flush=True)
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pretty(self.data))
        print(f"  {path}: {path.stat().st_size} bytes")


def versions():
    import torch
    import transformers
    return {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def pretty(data):
    """One line per prompt's field and per point: diffs stay readable and the file small."""
    compact = lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    lines = ["{"]
    for key, value in data.items():
        if key != "prompts":
            lines.append(f'"{key}": {compact(value)},')
    lines.append('"prompts": [')
    for number, prompt in enumerate(data["prompts"]):
        lines.append("{")
        for key, value in prompt.items():
            if key != "points":
                lines.append(f'"{key}": {compact(value)},')
        lines.append('"points": [')
        lines.append(",\n".join(compact(point) for point in prompt["points"]))
        lines.append("]}" + ("," if number + 1 < len(data["prompts"]) else ""))
    return "\n".join(lines + ["]}", ""])
