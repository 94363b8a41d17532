#!/usr/bin/env python3
"""Are the lines of a batch job's output what OpenAI's own Python library says they are?

Usage: check_batch_output.py OUTPUT.jsonl...    (pip install openai; "-" is standard input)

Every line must have the fields of an OpenAI Batch output line and no others; an answer must pass the library's types in
pydantic's strict mode, with every field known to them, and an error OpenAI's error object. Prints how many lines of each
kind there were; ends with 1 at the first line that is not as it must be.
"""
import json
import sys
from collections import Counter
from typing import Any, Optional

from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.shared import ErrorObject
from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Response(Strict):
    status_code: int
    request_id: str
    body: dict[str, Any]


class LineError(Strict):
    code: str
    message: str


class Line(Strict):
    id: str
    custom_id: Optional[str]
    response: Optional[Response]
    error: Optional[LineError]


def expect(good: bool, what: str) -> None:
    if not good:
        raise ValueError(what)


def expect_known(model: Any, path: str) -> None:
    """No field that the library's types do not have: they let such pass."""
    if isinstance(model, list):
        for i, item in enumerate(model):
            expect_known(item, f"{path}[{i}]")
    if isinstance(model, BaseModel):
        expect(not model.model_extra, f"{path}: unknown fields {list(model.model_extra or {})}")
        for name in type(model).model_fields:
            expect_known(getattr(model, name), f"{path}.{name}")


def check_aligned(logprobs: dict[str, list]) -> None:
    lengths = {name: len(values) for name, values in logprobs.items()}
    expect(len(set(lengths.values())) == 1, f"logprobs of several lengths: {lengths}")


def check_answer(body: dict[str, Any]) -> str:
    kind = body.get("object", "")
    types = {"chat.completion": ChatCompletion, "text_completion": Completion}
    expect(kind in types, f"an object of kind {kind!r}")
    expect([choice["index"] for choice in body["choices"]] == list(range(len(body["choices"]))), "choices out of order")
    if kind == "text_completion":
        for choice in body["choices"]:
            logprobs = choice["logprobs"]
            if logprobs is None:
                continue
            check_aligned(logprobs)
            # An echoed prompt's first token has null, as OpenAI's answers have; the library's types do not know it.
            if logprobs["token_logprobs"][:1] == [None]:
                for values in logprobs.values():
                    values.pop(0)
    answer = types[kind].model_validate_json(json.dumps(body), strict=True)
    expect_known(answer, kind)
    usage = answer.usage
    expect(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, "usage that does not add up")
    calls = sum(len(c.message.tool_calls or []) for c in answer.choices) if kind == "chat.completion" else 0
    return kind + (" with tool calls" if calls else "")


def check_line(text: str) -> str:
    line = Line.model_validate_json(text, strict=True)
    expect(line.id.startswith("batch_req_"), f"id {line.id!r}")
    expect((line.response is None) != (line.error is None), "a line has either a response or an error")
    if line.response is None:
        return f"error {line.error.code}"
    if line.response.status_code == 200:
        return check_answer(line.response.body)
    expect(set(line.response.body) == {"error"}, "the body of an error is the error")
    error = ErrorObject.model_validate_json(json.dumps(line.response.body["error"]), strict=True)
    expect_known(error, "error")
    return f"{line.response.status_code} {error.code}"


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__)
        return 2
    kinds: Counter[str] = Counter()
    ids: set[str] = set()
    for path in paths:
        with sys.stdin if path == "-" else open(path, encoding="ascii", newline="\n") as file:
            for number, text in enumerate(file, 1):
                try:
                    kinds[check_line(text)] += 1
                    ids.add(json.loads(text)["id"])
                except ValueError as error:
                    print(f"{path}:{number}: {error}", file=sys.stderr)
                    return 1
    lines = sum(kinds.values())
    if len(ids) != lines:
        print(f"{lines} lines have {len(ids)} ids", file=sys.stderr)
        return 1
    print(f"{lines} lines are as OpenAI's types say:", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
