"""Makes the goldens of the small checkpoint: python make_small_goldens.py CHECKPOINT [OUT]
CHECKPOINT is what make_small_checkpoint.py wrote; references and bounds are those of the random checkpoints."""

import argparse
import pathlib

from tokenizers import Tokenizer

from make_random_goldens import make_variant
from prompts import PROMPTS

MAX_TOKENS = 400


def prompts_of(directory):
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompts = [{"name": name, "text": text, "token_ids": tokenizer.encode(text).ids} for name, text in PROMPTS]
    return [prompt for prompt in prompts if len(prompt["token_ids"]) <= MAX_TOKENS]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("out", nargs="?", type=pathlib.Path, default=pathlib.Path(__file__).parent / "small")
    options = parser.parse_args()
    for fp8_activations in (False, True):
        make_variant(options.checkpoint, fp8_activations, options.out, prompts_of(options.checkpoint))


if __name__ == "__main__":
    main()
