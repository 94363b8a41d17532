"""Strings to compare tokenizers on: deterministic, all Unicode planes, white space, digits, code, contractions, emoji.

make(count) gives `count` strings over code points assigned by Unicode 14 (what PCRE2 10.42 and Python 3.11 know);
newer_code_points() gives those assigned after it, which are compared apart."""
import random
import sys
import unicodedata

assert unicodedata.unidata_version == "14.0.0", f"Python 3.11 knows Unicode 14; this one {unicodedata.unidata_version}"

WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2005\u200a\u2028\u2029\u202f\u205f\u3000"
# Look like white space or like letters, and are not, or only to some: the places where regex engines differ.
TRAPS = "\u180e\u200b\u200c\u200d\ufeff\u2060\x1c\x1d\x1e\x1f\x00\x7f\u017f\u212a\u0130\u0131\u00df\ufb06\u1e9e\u03c2\u00aa\u00b2\u00bd\u2160\u3007\u4e00"
CONTRACTIONS = ["'s", "'S", "'t", "'T", "'re", "'RE", "'Re", "'ve", "'vE", "'m", "'M", "'ll", "'LL", "'lL", "'d", "'D", "'\u017f",
                "'\u017fx", "\u2019s", "'ſ", "''s", "' s", "'sx", "x's", "X'S", "'rE's", "'K", "'\u212a", "'x"]
CODE = ["def f(x):\n    return x**2 # ok\n", "for (int i=0;i<n;++i){\n\t\ta[i]+=b[i];\r\n}\n", "<div class=\"a b\">&nbsp;</div>\n",
        "SELECT * FROM t WHERE a<>'x''y';", "x = {\"k\": [1, 2.5e-10, null]}\n", "#!/bin/sh\nset -e; echo \"$@\" | sed 's/a/b/g'\n",
        "https://example.org/a?b=c&d=%20#e", "C:\\dir\\file.txt", "\\frac{a}{b} \\cdot x_{i+1}^{2}", "0x7fff_ffff 1_000_000 3.14159"]
WORDS = ("the quick brown fox jumps over lazy dogs Hello World naïve café Straße Ελληνικά Привет мир שלום עולם مرحبا بالعالم "
         "नमस्ते दुनिया สวัสดี 你好世界 こんにちは 世界 안녕하세요 Việt Nam İstanbul ĲSSELMEER internationalization antidisestablishmentarianism "
         "e.g. i.e. O'Neill don't can't WE'LL they'd I'm you're rock'n'roll GPU FP8 e4m3 Llama-3.1 405B 12345 3.14159").split()
EMOJI = ["😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "❤️", "1️⃣", "🧑🏿‍🚀", "©️", "☃"]
BLOCKS = [(0x20, 0x7E), (0xA0, 0xFF), (0x100, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F), (0x590, 0x5FF), (0x600, 0x6FF),
          (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1EFF), (0x2000, 0x206F), (0x2070, 0x218F), (0x2190, 0x23FF),
          (0x2460, 0x24FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFE00, 0xFFFD), (0xFF00, 0xFFEF),
          (0x10000, 0x103FF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0x30000, 0x3134A), (0xE0001, 0xE01EF)]


def assigned(code_point):
    return unicodedata.category(chr(code_point)) not in ("Cn", "Cs")


ASSIGNED = [c for c in range(0x110000) if assigned(c) and not (0xF0000 <= c)] + [0xF0000, 0xFFFFD, 0x100000, 0x10FFFD]
BLOCK_CHARACTERS = [[c for c in range(low, high + 1) if assigned(c)] for low, high in BLOCKS]


def piece(rng):
    kind = rng.randrange(12)
    if kind == 0:
        return "".join(rng.choice(WHITE_SPACE) for _ in range(rng.randint(1, 6)))
    if kind == 1:
        return rng.choice(" \n\t") * rng.randint(1, 9)
    if kind == 2:
        return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 9)))
    if kind == 3:
        return rng.choice(CONTRACTIONS)
    if kind == 4:
        return rng.choice(EMOJI)
    if kind == 5:
        return rng.choice(CODE)[: rng.randint(1, 30)]
    if kind in (6, 7):
        return rng.choice(["", " "]) + rng.choice(WORDS)
    if kind == 8:
        characters = rng.choice(BLOCK_CHARACTERS)
        return "".join(chr(rng.choice(characters)) for _ in range(rng.randint(1, 6)))
    if kind == 9:
        return "".join(chr(rng.choice(ASSIGNED)) for _ in range(rng.randint(1, 4)))
    if kind == 10:
        return rng.choice(TRAPS) * rng.randint(1, 2)
    return "".join(rng.choice("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") for _ in range(rng.randint(1, 4)))


def make(count, seed=20240726):
    rng = random.Random(seed)
    strings = ["", " ", "  ", "\n", "\r\n", "a", "Hello, world!", "  two spaces\n\n\n  x", "don't DON'T we'll", "a  b   c", "tab\tx\r\ny",
               "The year is 12345.", "<|im_start|>system<|eot_id|>", "a" * 300, " " * 300, "\n" * 100, "ab" * 200, "9" * 50]
    strings += [a + b for a in ["x", " ", "1", "\n", ""] for b in CONTRACTIONS]
    strings += [a + w + b for w in WHITE_SPACE + TRAPS for a, b in [("", ""), ("a", "b"), (" ", " "), ("1", "\n"), (".", "é")]]
    strings += CODE + EMOJI + WORDS
    while len(strings) < count:
        strings.append("".join(piece(rng) for _ in range(rng.randint(1, 4))))
    return strings[:count]


def every_code_point():
    """Every assigned code point twice over, in strings of 64: with a letter before, and as a run."""
    strings = []
    for at in range(0, len(ASSIGNED), 64):
        characters = [chr(c) for c in ASSIGNED[at: at + 64]]
        strings.append("".join("a" + c for c in characters))
        strings.append("".join(characters))
    return strings


def newer_code_points():
    return [c for c in range(0x110000) if unicodedata.category(chr(c)) == "Cn"]


if __name__ == "__main__":
    for string in make(int(sys.argv[1])):
        print(repr(string))
