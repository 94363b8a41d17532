"""Hostile requests by the thousand, beside a neighbour whose tokens must not change by a bit.

    python3 tests/hostile_client.py HOST:PORT [--requests N] [--seed S]

Every number at its extremes, ids outside the vocabulary, sizes beyond reason, bytes that are no message, text that is no
UTF-8, calls that are cancelled at any moment, and connections that speak no gRPC. Prints what came of them; exit code 0 when
the engine lives, the neighbour got its tokens every time and nothing is left of anybody.
"""

import argparse
import collections
import random
import socket
import struct
import sys
import threading

import grpc
from google.protobuf.descriptor import FieldDescriptor as Field

from grpcio_server import CONTROL, INFERENCE, Server

INTEGERS = {Field.CPPTYPE_INT32: (-(2**31), 2**31 - 1), Field.CPPTYPE_UINT32: (0, 2**32 - 1),
            Field.CPPTYPE_INT64: (-(2**63), 2**63 - 1), Field.CPPTYPE_UINT64: (0, 2**64 - 1)}
FLOATS = [float("nan"), float("inf"), float("-inf"), -0.0, 0.0, -1.0, 1e-45, 3.4e38, -3.4e38, 0.5, 1.0]


def hostile_value(field, rng, depth):
    if field.cpp_type in INTEGERS:
        low, high = INTEGERS[field.cpp_type]
        return rng.choice([low, low + 1 if low else 1, -1 if low else 0, 0, 1, 7, 543, 544, 545, 10**6, high - 1, high])
    if field.cpp_type in (Field.CPPTYPE_FLOAT, Field.CPPTYPE_DOUBLE):
        return rng.choice(FLOATS)
    if field.cpp_type == Field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.cpp_type == Field.CPPTYPE_STRING:
        return rng.choice(["", "a", "\0", "é" * 50, "<|begin_of_text|>", "x" * rng.randint(1, 3000), "\u202e\n\r\x1b[31m"])
    if field.cpp_type == Field.CPPTYPE_ENUM:
        return rng.choice(list(field.enum_type.values_by_number))
    return None


def fill(message, rng, depth=0):
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.6 and depth + 1 < 4:
            continue
        repeated = field.label == Field.LABEL_REPEATED
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for _ in range(rng.choice([1, 2, 40])):
                getattr(message, field.name)[rng.choice([-1, 0, 5, 10**6])] = rng.choice(FLOATS)
        elif field.message_type is not None:
            count = rng.choice([0, 1, 1, 3, 70]) if repeated else 1
            for _ in range(count if depth < 4 else 0):
                target = getattr(message, field.name)
                fill(target.add() if repeated else target, rng, depth + 1)
                if not repeated:
                    target.SetInParent()
        elif repeated:
            getattr(message, field.name).extend(hostile_value(field, rng, depth) for _ in range(rng.choice([0, 1, 2, 100, 2000])))
        else:
            setattr(message, field.name, hostile_value(field, rng, depth))


def random_bytes(message, rng):
    """A message with a few bytes turned, cut or doubled; sometimes none at all."""
    data = bytearray(message.SerializeToString() if rng.random() < 0.8 else rng.randbytes(rng.randint(0, 300)))
    for _ in range(rng.randint(1, 8)):
        if data and rng.random() < 0.7:
            data[rng.randrange(len(data))] = rng.randrange(256)
        elif data:
            del data[rng.randrange(len(data)):]
    return bytes(data)


def raw_connection(address, rng):
    host, port = address.rsplit(":", 1)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    frames = [rng.randbytes(rng.randint(1, 200)), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", preface + rng.randbytes(60),
              preface + struct.pack(">I", 0xFFFFFF)[1:] + bytes([rng.randrange(12), rng.randrange(256)]) + rng.randbytes(4),
              preface + b"\0\0\0\x04\0\0\0\0\0" + b"\0\0\x05\x01\x05\0\0\0\x01\x82\x86\x84\x41\x8c"]
    try:
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(rng.choice(frames))
            connection.settimeout(0.02)
            connection.recv(100)
    except OSError:
        pass


def one_request(server, address, rng, counts):
    kind = rng.random()
    if kind < 0.03:
        raw_connection(address, rng)
        counts["raw connection"] += 1
        return
    method = rng.choice(["Generate"] * 6 + ["Chat", "Tokenize", "Detokenize", "Abort", "GetLoad"])
    service = CONTROL if method in ("Abort", "GetLoad") else INFERENCE
    message = server.request_class(service, method)()
    fill(message, rng)
    metadata = []
    if rng.random() < 0.1:
        metadata = [(rng.choice(["x-request-id", "traceparent", "octet-priority", "x-junk"]),
                     rng.choice(["", "x" * rng.randint(1, 20000), "-5", "00-0-0-0", "~" * 200]))]
    raw = random_bytes(message, rng) if kind < 0.25 else message.SerializeToString()
    try:
        answer = server.call(service, method, raw=raw, metadata=metadata, timeout=rng.choice([0.001, 0.05, 0.3]))
        if hasattr(answer, "__next__"):
            for i, _ in enumerate(answer):
                if i >= rng.randint(0, 4):
                    answer.cancel()
                    break
        counts["answered"] += 1
    except grpc.RpcError as error:
        counts[error.code().name] += 1
    except ValueError:
        counts["not sent: metadata that grpcio refuses"] += 1


def neighbour(server):
    """Token ids and logprobs of a greedy answer, every time the same."""
    tokens = []
    for response in server.generate(token_ids={"ids": [5, 6, 7, 8, 9]}, sampling={"temperature": 0}, logprobs=3, priority=0,
                                    stopping={"max_tokens": 24, "ignore_eos": True}):
        for token in response.tokens:
            tokens.append((token.token_id, token.logprob, tuple((t.token_id, t.logprob) for t in token.top)))
    return tokens


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    quiet = Server(arguments.address)
    expected = neighbour(quiet)
    done, different, answers = threading.Event(), [], [0]

    def watch():
        while not done.is_set():
            answers[0] += 1
            if neighbour(quiet) != expected:
                different.append(answers[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    counts = collections.Counter()

    def attack(index):
        rng = random.Random(arguments.seed * 1000 + index)
        server = Server(arguments.address)
        mine = collections.Counter()
        for _ in range(arguments.requests // arguments.threads):
            one_request(server, arguments.address, rng, mine)
        counts.update(mine)

    attackers = [threading.Thread(target=attack, args=(i,)) for i in range(arguments.threads)]
    for thread in attackers:
        thread.start()
    for thread in attackers:
        thread.join()
    done.set()
    watcher.join()
    load = quiet.wait_idle()
    print(f"{sum(counts.values())} hostile requests: " + ", ".join(f"{count} {what}" for what, count in counts.most_common()))
    print(f"{answers[0]} answers to a neighbour, {len(different)} of them different; engine "
          + (f"idle, {load.kv_blocks_free} of {load.kv_blocks_total} blocks free" if load else "NOT idle"))
    blind = counts["answered"] == 0 or counts["INVALID_ARGUMENT"] == 0 or answers[0] == 0
    sys.exit(1 if different or load is None or blind or neighbour(quiet) != expected else 0)


if __name__ == "__main__":
    main()
