"""Cuts a checkpoint of octet convert down to a few layers and the first rows of its vocabulary, so that a real model's
numbers fit a bundle that is carried to other machines. Needs no package: the bytes that stay are copied as they are.

    python make_small_checkpoint.py MODEL OUT [--layers 4] [--vocabulary 4096]

OUT/made_from.json says what was cut from what. A byte-level BPE's ids are in the order of its merges, so the first rows
are a tokenizer of their own: the merges among them."""

import argparse
import hashlib
import json
import pathlib
import re
import shutil
import struct


def read_header(file):
    length, = struct.unpack("<Q", file.read(8))
    return json.loads(file.read(length)), 8 + length


def stays(name, layers):
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is None or int(layer.group(1)) < layers


def cut_weights(source, destination, layers, vocabulary):
    with open(source, "rb") as file:
        header, begin = read_header(file)
        metadata = header.pop("__metadata__", None)
        cut, tensors, end = {}, [], 0
        kept = [name for name in header if stays(name, layers)]
        for name in sorted(kept, key=lambda name: header[name]["data_offsets"]):
            first, last = header[name]["data_offsets"]
            shape = list(header[name]["shape"])
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                last = first + (last - first) // shape[0] * vocabulary
                shape[0] = vocabulary
            file.seek(begin + first)
            tensors.append(file.read(last - first))
            cut[name] = {"dtype": header[name]["dtype"], "shape": shape, "data_offsets": [end, end + last - first]}
            end += last - first
    if metadata is not None:
        cut["__metadata__"] = metadata
    text = json.dumps(cut, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(destination, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(tensors)


def cut_config(config, layers, vocabulary):
    config = dict(config, num_hidden_layers=layers, vocab_size=vocabulary)
    quantization = config.get("quantization_config")
    if quantization and "modules_to_not_convert" in quantization:
        kept = [name for name in quantization["modules_to_not_convert"] if stays(name + ".", layers)]
        config["quantization_config"] = dict(quantization, modules_to_not_convert=kept)
    return config


def cut_tokenizer(tokenizer, vocabulary):
    model = tokenizer["model"]
    vocab = {token: id for token, id in model["vocab"].items() if id < vocabulary}
    parts = lambda merge: merge.split(" ") if isinstance(merge, str) else merge
    merges = [m for m in model["merges"] if all(t in vocab for t in (*parts(m), "".join(parts(m))))]
    added = [token for token in tokenizer.get("added_tokens", []) if token["id"] < vocabulary]
    return dict(tokenizer, added_tokens=added, model=dict(model, vocab=vocab, merges=merges))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    arguments = parser.parse_args()
    model, out = arguments.model, arguments.out
    config = json.loads((model / "config.json").read_text())
    if arguments.layers > config["num_hidden_layers"] or arguments.vocabulary > config["vocab_size"]:
        parser.error(f"{model} has only {config['num_hidden_layers']} layers and {config['vocab_size']} tokens")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    cut_weights(model / "model.safetensors", out / "model.safetensors", arguments.layers, arguments.vocabulary)
    write_json(out / "config.json", cut_config(config, arguments.layers, arguments.vocabulary))
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(out / "tokenizer.json", cut_tokenizer(tokenizer, arguments.vocabulary))
    for name in ("generation_config.json", "tokenizer_config.json"):
        shutil.copy(model / name, out / name)
    write_json(out / "made_from.json", {
        "what": f"the first {arguments.layers} of {config['num_hidden_layers']} layers and the first "
                f"{arguments.vocabulary} of {config['vocab_size']} tokens of {model.name}",
        "source_sha256": sha256(model / "model.safetensors"), "sha256": sha256(out / "model.safetensors")})


if __name__ == "__main__":
    main()
