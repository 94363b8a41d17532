"""Compares an engine's logprobs with a golden file: python compare_logprobs.py GOLDEN.json ENGINE.jsonl

Each line of ENGINE.jsonl is an object with "prompt_token_ids", "token_ids" (generated) and either
  "logprobs":     [logprob of each generated token], or
  "top_logprobs": [[[id, logprob], ...] per generated token] (lists of {"token_id", "logprob"} are read too), or both.
A step counts where its prompt + the tokens generated before it are a prefix that the golden has a point for. Exit status 1:
more than 1.5 times bfloat16's difference, or a clear greedy token missed."""

import argparse
import json
import pathlib
import sys

from golden_io import Bound

PASS = 1.5


def golden_points(golden):
    """{prefix as a tuple of ids: point}"""
    points = {}
    for prompt in golden["prompts"]:
        sequence = prompt["token_ids"] + prompt["continuation"]
        for point in prompt["points"]:
            points[tuple(sequence[:point["prefix"]])] = point
    return points


def engine_steps(line):
    """(prefix, chosen id, {id: logprob}) of every generated token."""
    prompt, chosen = line["prompt_token_ids"], line["token_ids"]
    for k, token in enumerate(chosen):
        found = {}
        for item in (line.get("top_logprobs") or [[]] * len(chosen))[k]:
            token_id, logprob = (item["token_id"], item["logprob"]) if isinstance(item, dict) else item
            found[token_id] = logprob
        if line.get("logprobs"):
            found.setdefault(token, line["logprobs"][k])
        yield tuple(prompt + chosen[:k]), token, found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=pathlib.Path)
    parser.add_argument("engine", type=pathlib.Path)
    options = parser.parse_args()
    golden = json.loads(options.golden.read_text())
    bound = golden["bounds"]["transformers_bfloat16"]["points"]
    points = golden_points(golden)
    difference, from_rounded, compared, clear, missed = Bound(), Bound(), 0, 0, []
    for text in options.engine.read_text().splitlines():
        for prefix, token, found in engine_steps(json.loads(text)) if text.strip() else ():
            point = points.get(prefix)
            if point is None:
                continue
            compared += 1
            for (token_id, logprob), rounded in zip(point["top"], point.get("rounded", [None] * len(point["top"]))):
                if token_id in found:
                    difference.add(logprob, found[token_id])
                    if rounded is not None:
                        from_rounded.add(rounded, found[token_id])
            if point["margin"] > 2 * PASS * bound["max"]:
                clear += 1
                if token != point["top"][0][0]:
                    missed.append((len(prefix), point["top"][0][0], token))
    print(f"{compared} of {len(points)} points, |difference| of {difference.count} logprobs")
    for what, ours, theirs in (("mean", difference.mean(), bound["mean"]), ("max", difference.max, bound["max"])):
        print(f"  {what:4} {ours:.6f}   bfloat16 {theirs:.6f}   ratio {ours / theirs:.3f} (pass <= {PASS})")
    if from_rounded.count:
        noise = golden["bounds"]["from_rounded"]["float64_sums"]["mean"]
        print(f"  from rounded: mean {from_rounded.mean():.6f} max {from_rounded.max:.6f}   order of sums alone: mean {noise:.6f}")
    print(f"  greedy: {clear} points with a clear margin, {len(missed)} missed {missed[:5]}")
    passed = (compared and difference.count and not missed and difference.mean() <= PASS * bound["mean"]
              and difference.max <= PASS * bound["max"])
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
