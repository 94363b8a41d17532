"""A gRPC client that is not Octet's: grpcio, with nothing but the server's reflection to know the API from.

    python3 tests/grpcio_client.py HOST:PORT [TOKEN_FILE]

Needs the packages grpcio, grpcio-reflection and protobuf. Lists the services, streams a completion, cancels another, checks
that the server is idle afterwards and that it refuses what it should. Exit code 0 when all of that is as it must be.
"""

import sys
import time

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


class WithToken(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Shows the token with every call, reflection's too."""

    def __init__(self, token):
        self.metadata = (("authorization", f"Bearer {token}"),)

    def _call(self, continuation, details, request):
        return continuation(details._replace(metadata=self.metadata), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_stream = _call


class Server:
    def __init__(self, address, token):
        self.channel = grpc.insecure_channel(address)
        if token:
            self.channel = grpc.intercept_channel(self.channel, WithToken(token))
        self.reflection = ProtoReflectionDescriptorDatabase(self.channel)
        self.pool = DescriptorPool(self.reflection)

    def services(self):
        return sorted(self.reflection.get_services())

    def call(self, service_name, method, **fields):
        descriptor = self.pool.FindServiceByName(service_name).methods_by_name[method]
        request = message_factory.GetMessageClass(descriptor.input_type)
        response = message_factory.GetMessageClass(descriptor.output_type)
        kind = self.channel.unary_stream if descriptor.server_streaming else self.channel.unary_unary
        name = f"/{service_name}/{method}"
        stub = kind(name, request_serializer=request.SerializeToString, response_deserializer=response.FromString)
        return stub(request(**fields), timeout=120)

    def generate(self, **fields):
        return self.call("octet.v1.InferenceService", "Generate", **fields)

    def load(self):
        return self.call("octet.v1.ControlService", "GetLoad")


def check(good, what):
    if not good:
        sys.exit(f"FAILED: {what}")
    print(f"ok: {what}")


def check_stream(server):
    text, tokens, last = "", 0, None
    for response in server.generate(
        chat={"messages": [{"role": "user", "content": "What is the capital of France?"}]},
        sampling={"temperature": 0},
        stopping={"max_tokens": 40},
    ):
        text += response.text
        tokens += len(response.tokens)
        if last is not None and last.finish_reason != 0:
            check(False, "nothing comes after the end")
        last = response
    print(f"    {text!r}")
    check(last.finish_reason != 0 and last.usage.completion_tokens == tokens > 0, f"streamed {tokens} tokens to a proper end")


def check_cancel(server):
    stream = server.generate(prompt="Once upon a time", stopping={"ignore_eos": True})
    next(stream)
    stream.cancel()
    try:
        for _ in stream:
            pass
        check(False, "a cancelled stream ends with a status")
    except grpc.RpcError as error:
        check(error.code() == grpc.StatusCode.CANCELLED, "cancelled a stream")
    deadline = time.monotonic() + 30
    while True:
        load = server.load()
        if load.requests_running == load.requests_waiting == 0 and load.kv_blocks_free == load.kv_blocks_total:
            break
        if time.monotonic() > deadline:
            check(False, "the cancelled request leaves the server")
        time.sleep(0.02)
    check(True, f"the server is idle again: {load.kv_blocks_free} of {load.kv_blocks_total} blocks are free")


def check_refusal(server):
    try:
        list(server.generate(prompt="x", sampling={"temperature": -1}))
        check(False, "a negative temperature is refused")
    except grpc.RpcError as error:
        check(error.code() == grpc.StatusCode.INVALID_ARGUMENT, f"refused: {error.details()}")


def check_token(address):
    try:
        Server(address, None).services()
        check(False, "reflection without the token is refused")
    except grpc.RpcError as error:
        check(error.code() == grpc.StatusCode.UNAUTHENTICATED, "reflection without the token is refused")


def main():
    address = sys.argv[1]
    token = open(sys.argv[2]).read().strip() if len(sys.argv) > 2 else None
    if token:
        check_token(address)
    server = Server(address, token)
    names = server.services()
    check("octet.v1.InferenceService" in names and "octet.v1.ControlService" in names, f"services: {', '.join(names)}")
    check(not any("internal" in name for name in names), "no internal service is to be seen")
    health = server.call("grpc.health.v1.Health", "Check", service="octet.v1.InferenceService")
    check(health.status == 1, "health says SERVING")
    model = server.call("octet.v1.ControlService", "GetModelInfo")
    check(model.vocab_size > 0, f"model {model.model}, vocabulary {model.vocab_size}, context {model.max_context}")
    check_stream(server)
    check_cancel(server)
    check_refusal(server)


if __name__ == "__main__":
    main()
