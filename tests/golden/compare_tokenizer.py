"""Compares Octet's tokenizer with Hugging Face `tokenizers`, string by string; prints mismatches and newer code points.

    python compare_tokenizer.py --cli build/release/tests/tokenizer_cli [--smollm2-gguf FILE] [--smollm2-directory DIR]
                                [--llama3 tokenizer.model] [--count 20000]

The Llama 3 vocabulary is Meta's and is not in this repository: the PyPI package llama-models has it (found by itself when
installed). --smollm2-directory is a model directory whose tokenizer.json is compared instead of one that this script writes."""
import argparse
import importlib.util
import json
import pathlib
import subprocess
import tempfile

import reference_tokenizers
import text_strings


def octet_lines(cli, directory, mode, values):
    lines = "".join(json.dumps(v) + "\n" for v in values)
    return subprocess.run([cli, str(directory), mode], input=lines, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def octet_ids(cli, directory, mode, strings):
    return [[int(i) for i in line.split()] for line in octet_lines(cli, directory, mode, strings)]


def reference_ids(tokenizer, strings, parse_special):
    tokenizer.encode_special_tokens = not parse_special
    return [e.ids for e in tokenizer.encode_batch(strings, add_special_tokens=False)]


def count_mismatches(name, strings, ours, theirs, shown=5):
    assert len(ours) == len(theirs) == len(strings)
    wrong = [i for i in range(len(strings)) if ours[i] != theirs[i]]
    print(f"{name}: {len(wrong)} mismatches of {len(strings)} strings, {sum(map(len, theirs))} tokens")
    for i in wrong[:shown]:
        print(f"    {strings[i]!r}\n      octet     {ours[i]}\n      reference {theirs[i]}")
    return len(wrong)


def newer_mismatches(cli, directory, tokenizer):
    code_points = text_strings.newer_code_points()
    strings = [f"a{chr(c)}b {chr(c)}1" for c in code_points]
    ours, theirs = octet_ids(cli, directory, "encode", strings), reference_ids(tokenizer, strings, False)
    return [c for c, a, b in zip(code_points, ours, theirs) if a != b]


def ranges(code_points):
    out = []
    for c in code_points:
        if out and out[-1][1] == c - 1:
            out[-1][1] = c
        else:
            out.append([c, c])
    return " ".join(f"U+{a:04X}" if a == b else f"U+{a:04X}-{b:04X}" for a, b in out)


def with_specials(tokenizer, strings):
    names = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    return [names[i % len(names)].join([s, s[::-1], ""]) for i, s in enumerate(strings)]


def compare(cli, name, tokenizer, directory, count):
    strings = text_strings.make(count)
    every = text_strings.every_code_point()
    wrong = 0
    for label, mode, parse, texts in [("plain", "encode", False, strings), ("every code point", "encode", False, every),
                                      ("special names as text", "encode", False, with_specials(tokenizer, strings[:3000])),
                                      ("special tokens parsed", "encode-special", True, with_specials(tokenizer, strings[:3000]))]:
        wrong += count_mismatches(f"{name}, {label}", texts, octet_ids(cli, directory, mode, texts), reference_ids(tokenizer, texts, parse))
    ids = reference_ids(tokenizer, strings[:5000], False)
    ids += [i[:1 + len(i) // 2] for i in ids]
    theirs = [tokenizer.decode(i, skip_special_tokens=False) for i in ids]
    wrong += count_mismatches(f"{name}, decode", ids, [json.loads(l) for l in octet_lines(cli, directory, "decode", ids)], theirs)
    newer = newer_mismatches(cli, directory, tokenizer)
    print(f"{name}, code points not assigned in Unicode 14: {len(newer)} differ: {ranges(newer)}")
    return wrong


def installed_llama3():
    spec = importlib.util.find_spec("llama_models")
    path = pathlib.Path(spec.submodule_search_locations[0], "llama3", "tokenizer.model") if spec else None
    return path if path and path.exists() else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cli", required=True)
    parser.add_argument("--smollm2-gguf")
    parser.add_argument("--smollm2-directory", type=pathlib.Path)
    parser.add_argument("--llama3", default=installed_llama3())
    parser.add_argument("--count", type=int, default=20000)
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        if options.llama3:
            tokenizer = reference_tokenizers.llama3(options.llama3)
            for spelling, as_strings in [("merges as pairs", False), ("merges as strings", True)]:
                reference_tokenizers.save(tokenizer, scratch / spelling, as_strings, bos_token="<|begin_of_text|>")
                wrong += compare(options.cli, f"Llama 3 ({spelling})", tokenizer, scratch / spelling,
                                 options.count if not as_strings else 1000)
        if options.smollm2_gguf:
            tokenizer = reference_tokenizers.smollm2(options.smollm2_gguf)
            directory = options.smollm2_directory
            if directory is None:
                directory = scratch / "smollm2"
                reference_tokenizers.save(tokenizer, directory)
            wrong += compare(options.cli, "SmolLM2", tokenizer, directory, options.count)
            gpt2 = reference_tokenizers.gpt2_style(tokenizer)
            reference_tokenizers.save(gpt2, scratch / "gpt2")
            wrong += compare(options.cli, "SmolLM2's vocabulary, GPT-2's pre-tokenizer", gpt2, scratch / "gpt2", options.count)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
