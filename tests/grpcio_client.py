"""What a client that is not Octet's can rely on: streams, cancels, deadlines, every status that a client can provoke, and
that no method answers without credentials.

    python3 tests/grpcio_client.py HOST:PORT [TOKEN_FILE] [--drain]

With --drain the server is told to end at last. Exit code 0 when all is as it must be.
"""

import argparse
import sys
import threading
import time

import grpc

from grpcio_server import CONTROL, INFERENCE, Server

ENDLESS = {"ignore_eos": True}


def check(good, what):
    if not good:
        sys.exit(f"FAILED: {what}")
    print(f"ok: {what}", flush=True)


def status_of(call):
    """The error that the call ends with, or None."""
    try:
        answer = call()
        if hasattr(answer, "__next__"):
            for _ in answer:
                pass
        return None
    except grpc.RpcError as error:
        return error


def check_status(call, code, what):
    error = status_of(call)
    check(error is not None and error.code() == code, f"{code.name}: {what}: {error.details() if error else 'no error'}")
    return error


def check_stream(server):
    tokens, last = 0, None
    for response in server.generate(prompt="Once upon a time", sampling={"temperature": 0}, stopping={"max_tokens": 40}):
        check(last is None or last.finish_reason == 0, "nothing comes after the end") if last is not None and last.finish_reason else None
        tokens += len(response.tokens)
        last = response
    check(last.finish_reason != 0 and last.usage.completion_tokens == tokens > 0, f"streamed {tokens} tokens to a proper end")


def check_outputs(server):
    ends = {}
    for response in server.generate(prompt="Once", sampling={"n": 3, "temperature": 1.0}, stopping={"max_tokens": 8, **ENDLESS}):
        check(response.output_index not in ends, "an output ends once") if response.output_index in ends else None
        if response.finish_reason:
            ends[response.output_index] = response.finish_reason
    check(sorted(ends) == [0, 1, 2], "three outputs, each with its index and its end")


def check_cancel(server):
    stream = server.generate(prompt="Once upon a time", stopping=ENDLESS)
    next(stream)
    stream.cancel()
    check_status(lambda: stream, grpc.StatusCode.CANCELLED, "a stream that the client cancels")
    load = server.wait_idle()
    check(load is not None, "the server is idle again and all blocks are free")


def check_deadline(server):
    check_status(lambda: server.generate(prompt="Once", stopping=ENDLESS, sampling={"n": 8}, timeout=0.2),
                 grpc.StatusCode.DEADLINE_EXCEEDED, "a deadline that passes")
    check(server.wait_idle() is not None, "what was late has left the server")


def check_refusals(server, model):
    code = grpc.StatusCode
    check_status(lambda: server.generate(prompt="x", sampling={"temperature": -1}), code.INVALID_ARGUMENT, "a bad field")
    check_status(lambda: server.generate(token_ids={"ids": [1] * (model.max_context + 5)}), code.OUT_OF_RANGE, "a prompt longer than the context")
    check_status(lambda: server.generate(prompt="x" * (5 << 20)), code.RESOURCE_EXHAUSTED, "a message that is too large")
    if not model.chat_format:
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        check_status(lambda: server.generate(chat=chat), code.FAILED_PRECONDITION, "a chat with a model that has no format")
    unknown = server.channel.unary_unary("/octet.v1.InferenceService/Embed", request_serializer=bytes, response_deserializer=bytes)
    check_status(lambda: unknown(b"", timeout=10, metadata=server.metadata), code.UNIMPLEMENTED, "a method that is not there")
    internal = server.channel.stream_stream("/octet.internal.v1.WorkerService/Work", request_serializer=bytes, response_deserializer=bytes)
    check_status(lambda: internal(iter([b""]), timeout=10, metadata=server.metadata), code.UNIMPLEMENTED, "the ranks' service, from outside")


def check_abort(server):
    errors = []
    stream = threading.Thread(target=lambda: errors.append(
        status_of(lambda: server.generate(prompt="Once", stopping=ENDLESS, request_id="to be aborted"))))
    stream.start()
    while server.load().requests_running == 0:
        time.sleep(0.01)
    while server.call(CONTROL, "Abort", request_ids=["to be aborted"]).aborted == 0:
        time.sleep(0.01)
    stream.join()
    check(errors[0] is not None and errors[0].code() == grpc.StatusCode.ABORTED, f"ABORTED: {errors[0].details()}")


def check_credentials(address, server, names):
    """Every method of every service, with no credentials, wrong ones, two of them, and a right one in the wrong place."""
    token = server.metadata[0][1]
    wrong = {"no token": [], "a wrong token": [("authorization", "Bearer wrong")],
             "two tokens": [("authorization", token), ("authorization", token)],
             "a token without its scheme": [("authorization", token.split()[1])], "an API key": [("x-api-key", token)]}
    channel = grpc.insecure_channel(address)
    refused = 0
    for name in names:
        for method in server.methods(name):
            for what, metadata in wrong.items():
                call = channel.unary_unary(f"/{name}/{method}", request_serializer=bytes, response_deserializer=bytes)
                error = status_of(lambda: call(b"", timeout=10, metadata=metadata))
                if error is None or error.code() != grpc.StatusCode.UNAUTHENTICATED:
                    check(False, f"/{name}/{method} with {what} is UNAUTHENTICATED, not {error}")
                refused += 1
    check(True, f"UNAUTHENTICATED: {refused} calls, every method of {len(names)} services with {len(wrong)} kinds of bad credentials")


def check_drain(server):
    begun, errors = threading.Event(), []

    def run():
        try:
            for _ in server.generate(prompt="Once", stopping=ENDLESS):
                begun.set()
        except grpc.RpcError as error:
            errors.append(error)

    stream = threading.Thread(target=run)
    stream.start()
    begun.wait(30)
    server.call(CONTROL, "Drain")
    error = status_of(lambda: server.generate(prompt="too late", stopping={"max_tokens": 1}))
    check(error is not None and error.code() == grpc.StatusCode.UNAVAILABLE, f"UNAVAILABLE: {error.details()}")
    stream.join()
    ended = errors[0].code() if errors else "its end"
    check(ended in ("its end", grpc.StatusCode.UNAVAILABLE), f"a stream under way ends with {ended}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("token_file", nargs="?")
    parser.add_argument("--drain", action="store_true")
    arguments = parser.parse_args()
    token = open(arguments.token_file).read().strip() if arguments.token_file else None
    server = Server(arguments.address, token)
    names = server.services()
    check(INFERENCE in names and CONTROL in names, f"services: {', '.join(names)}")
    check(not any("internal" in name for name in names), "no internal service is to be seen")
    check(server.call("grpc.health.v1.Health", "Check", service=INFERENCE).status == 1, "health says SERVING")
    model = server.call(CONTROL, "GetModelInfo")
    check(model.vocab_size > 0, f"model {model.model}, vocabulary {model.vocab_size}, context {model.max_context}")
    check_stream(server)
    check_outputs(server)
    check_cancel(server)
    check_deadline(server)
    check_refusals(server, model)
    check_abort(server)
    if token:
        check_credentials(arguments.address, server, names)
    if arguments.drain:
        check_drain(server)
    print("all is as it must be")


if __name__ == "__main__":
    main()
