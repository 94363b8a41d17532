"""Writes smollm2_tokenizer.bin: 10,000 strings and what Hugging Face `tokenizers` makes of them with SmolLM2's vocabulary.

    python make_tokenizer_goldens.py SmolLM2-135M-Instruct.gguf

The reference reads the GGUF file itself. Format, every number LEB128: length, UTF-8 bytes, count, ids; again and again.
The golden of Llama 3 is not kept, because its vocabulary is not: compare_tokenizer.py makes it anew."""
import pathlib
import sys

import reference_tokenizers
import text_strings

STRINGS = 10_000


def leb128(number):
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def main():
    tokenizer = reference_tokenizers.smollm2(sys.argv[1])
    tokenizer.encode_special_tokens = True
    strings = text_strings.make(STRINGS)
    out = bytearray()
    for string, encoding in zip(strings, tokenizer.encode_batch(strings, add_special_tokens=False), strict=True):
        text = string.encode()
        out += leb128(len(text)) + text + leb128(len(encoding.ids)) + b"".join(map(leb128, encoding.ids))
    path = pathlib.Path(__file__).with_name("smollm2_tokenizer.bin")
    path.write_bytes(out)
    print(f"{path.name}: {len(strings)} strings, {len(out)} bytes")


if __name__ == "__main__":
    main()
