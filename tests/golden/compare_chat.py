"""Compares Octet's chat formats with the checkpoint's own chat template, rendered by transformers and tokenised by `tokenizers`.

    python compare_chat.py --cli build/release/tests/tokenizer_cli --directory MODEL_DIRECTORY [--template FILE] [--count 2000]

--template stands in for the directory's own template. Random conversations: roles, tools, tool calls, odd white space. Where
the template raises, Octet must refuse; where Octet refuses, the template must raise or the reason must be one of STRICTER."""
import argparse
import json
import pathlib
import random
import shutil
import tempfile

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import text_strings
from compare_tokenizer import octet_lines

# Refused by Octet although the template renders something: text that no model was trained on.
STRICTER = ("the first message after the system's must be the user's", "no content", "built-in tools", "no place for", "has role")

TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Wetter: \"für\" a <city> & more\n\t\u00e9\x01",
                                          "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}},
         {"name": "f", "empty": {}, "list": [], "nested": [1, -2, 2.5, 1e20, 1e15, 1e16, 1e-7, 0.0001, -0.0, 1.0, 12345678901234567890123, [[]], None, True]}]


def arguments(rng):
    return {rng.choice(["query", "city", "n", "ü"]): rng.choice(["a \"b\"", "x", " ", 5, 1.5, None, ["q", {"z": 1}], "\u2028\x07"]) for _ in range(rng.randint(0, 3))}


def conversation(rng, strings):
    text = lambda: rng.choice(["", " ", "\n", "\u3000\x1c\u0085"]) + rng.choice(strings) + rng.choice(["", " \n", "\x1f\u00a0"])
    messages = [{"role": "system", "content": text()}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        if rng.random() < 0.4:
            call = {"function": {"name": rng.choice(["get_weather", "brave_search", "f"]), "arguments": arguments(rng)}}
            messages.append({"role": "assistant", "content": text(), "tool_calls": [call] * rng.choice([1, 1, 1, 2])})
            messages.append({"role": rng.choice(["tool", "ipython"]), "content": text()})
        if rng.random() < 0.6:
            messages.append({"role": rng.choice(["assistant", "assistant", "system"]), "content": text()})
    if rng.random() < 0.1:
        messages.reverse()
    request = {"messages": messages, "add_generation_prompt": rng.random() < 0.8}
    if rng.random() < 0.3:
        request["tools"] = rng.sample(TOOLS, rng.randint(1, 2))
    if rng.random() < 0.2:
        request["tools_in_user_message"] = False
    if rng.random() < 0.2:
        request["builtin_tools"] = rng.sample(["brave_search", "wolfram_alpha", "code_interpreter"], rng.randint(1, 3))
    if rng.random() < 0.5:
        request["date_string"] = "05 Feb 2025"
    return request


def for_octet(request):
    """Tools and arguments as the JSON text that Octet's interface takes."""
    request = json.loads(json.dumps(request))
    for message in request["messages"]:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    request["tools"] = [json.dumps(tool) for tool in request.get("tools", [])]
    return request


def reference(tokenizer, raw, template, request):
    options = {k: v for k, v in request.items() if k != "messages"}
    options.setdefault("date_string", "26 Jul 2024")
    try:
        rendered = tokenizer.apply_chat_template(request["messages"], chat_template=template, tokenize=False, **options)
    except Exception as error:  # whatever the template engine raises
        return f"error: {error}"
    return " ".join(str(i) for i in raw.encode(rendered, add_special_tokens=False).ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cli", required=True)
    parser.add_argument("--directory", required=True, type=pathlib.Path)
    parser.add_argument("--template", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=2000)
    options = parser.parse_args()
    config = json.loads((options.directory / "tokenizer_config.json").read_text())
    template = options.template.read_text() if options.template else config["chat_template"]
    raw = Tokenizer.from_file(str(options.directory / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=config.get("bos_token"))
    rng = random.Random(7)
    strings = [s for s in text_strings.make(3000) if "<|" not in s]
    requests = [conversation(rng, strings) for _ in range(options.count)]
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(options.directory / "tokenizer.json", scratch)
        (pathlib.Path(scratch) / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        ours = octet_lines(options.cli, scratch, "chat", map(for_octet, requests))
    equal = refused = stricter = wrong = 0
    for request, mine in zip(requests, ours, strict=True):
        theirs = reference(tokenizer, raw, template, request)
        if mine == theirs:
            equal += 1
        elif mine.startswith("error: ") and theirs.startswith("error: "):
            refused += 1
        elif mine.startswith("error: ") and any(reason in mine for reason in STRICTER):
            stricter += 1
        else:
            wrong += 1
            if wrong <= 3:
                print(json.dumps(request), "\n  octet    ", mine[:300], "\n  reference", theirs[:300])
    print(f"{len(requests)} chats: {equal} equal, {refused} refused by both, {stricter} refused by Octet alone, {wrong} wrong")
    raise SystemExit(1 if wrong or equal < len(requests) // 4 else 0)


if __name__ == "__main__":
    main()
