"""A server seen through grpcio, which is not Octet's, with nothing but the server's reflection to know the API from.

Needs the packages grpcio and protobuf (Debian: python3-grpcio, python3-protobuf), of whatever version.
"""

import time

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

CONTROL, INFERENCE = "octet.v1.ControlService", "octet.v1.InferenceService"


def message_class(descriptor):
    if hasattr(message_factory, "GetMessageClass"):
        return message_factory.GetMessageClass(descriptor)
    return message_factory.MessageFactory().GetPrototype(descriptor)


def reflection_messages():
    """The part of grpc.reflection.v1alpha that is used here; the package with the rest need not be installed."""
    file = descriptor_pb2.FileDescriptorProto(name="reflection.proto", package="grpc.reflection.v1alpha", syntax="proto3")
    fields = descriptor_pb2.FieldDescriptorProto

    def add(name, *members):
        message = file.message_type.add(name=name)
        for number, field, kind, repeated in members:
            label = fields.LABEL_REPEATED if repeated else fields.LABEL_OPTIONAL
            if isinstance(kind, str):
                message.field.add(name=field, number=number, label=label, type=fields.TYPE_MESSAGE,
                                  type_name=f".grpc.reflection.v1alpha.{kind}")
            else:
                message.field.add(name=field, number=number, label=label, type=kind)

    add("Request", (4, "file_containing_symbol", fields.TYPE_STRING, False), (7, "list_services", fields.TYPE_STRING, False))
    add("Files", (1, "file_descriptor_proto", fields.TYPE_BYTES, True))
    add("Service", (1, "name", fields.TYPE_STRING, False))
    add("Services", (1, "service", "Service", True))
    add("Response", (4, "file_descriptor_response", "Files", False), (6, "list_services_response", "Services", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    name = "grpc.reflection.v1alpha."
    return message_class(pool.FindMessageTypeByName(name + "Request")), message_class(
        pool.FindMessageTypeByName(name + "Response"))


class Server:
    def __init__(self, address, token=None):
        self.channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])
        self.metadata = [("authorization", f"Bearer {token}")] if token else []
        self.pool = descriptor_pool.DescriptorPool()
        self.files = set()

    def reflect(self, **request):
        request_class, response_class = reflection_messages()
        stub = self.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                                          request_serializer=request_class.SerializeToString,
                                          response_deserializer=response_class.FromString)
        return next(iter(stub(iter([request_class(**request)]), metadata=self.metadata, timeout=30)))

    def services(self):
        return sorted(service.name for service in self.reflect(list_services="*").list_services_response.service)

    def service(self, name):
        try:
            return self.pool.FindServiceByName(name)
        except KeyError:
            answer = self.reflect(file_containing_symbol=name).file_descriptor_response
            files = {}
            for data in answer.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(data)
                files[file.name] = file
            for file in files.values():
                self.add_file(file, files)
            return self.pool.FindServiceByName(name)

    def add_file(self, file, files):
        """What it needs first: pools of some versions take nothing else."""
        if file.name in self.files:
            return
        self.files.add(file.name)
        for needed in file.dependency:
            if needed in files:
                self.add_file(files[needed], files)
        self.pool.Add(file)

    def methods(self, service_name):
        return list(self.service(service_name).methods_by_name)

    def call(self, service_name, method, request=None, metadata=(), timeout=120, raw=None, **fields):
        """A response, or an iterator of them. `raw`: these bytes instead of a request."""
        service = self.service(service_name)
        descriptor = service.methods_by_name[method]
        request_class, response_class = message_class(descriptor.input_type), message_class(descriptor.output_type)
        streams = getattr(descriptor, "server_streaming", None)
        if streams is None:  # older protobuf does not tell
            proto = descriptor_pb2.ServiceDescriptorProto()
            service.CopyToProto(proto)
            streams = next(m.server_streaming for m in proto.method if m.name == method)
        kind = self.channel.unary_stream if streams else self.channel.unary_unary
        serializer = (lambda data: data) if raw is not None else request_class.SerializeToString
        stub = kind(f"/{service_name}/{method}", request_serializer=serializer, response_deserializer=response_class.FromString)
        message = raw if raw is not None else request if request is not None else request_class(**fields)
        return stub(message, timeout=timeout, metadata=self.metadata + list(metadata))

    def request_class(self, service_name, method):
        return message_class(self.service(service_name).methods_by_name[method].input_type)

    def generate(self, **fields):
        return self.call(INFERENCE, "Generate", **fields)

    def load(self):
        return self.call(CONTROL, "GetLoad")

    def wait_idle(self, seconds=30):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            load = self.load()
            if load.requests_running == load.requests_waiting == 0 and load.kv_blocks_free == load.kv_blocks_total:
                return load
            time.sleep(0.02)
        return None
