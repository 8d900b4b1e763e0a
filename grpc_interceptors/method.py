"""Floor 4: what is known of one method before its first call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import MethodOptions

from grpc_interceptors.options import Beside, MethodPolicies

if TYPE_CHECKING:
    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]
else:
    Handler = grpc.RpcMethodHandler  # generic for type checkers only


@dataclass(frozen=True, slots=True)
class Method:
    """One registered method.

    Args:
        name: ``/pkg.Service/Method``.
        streaming: True unless both sides send one message.
        request_streaming: True where the client sends many.
        safe: True where the .proto declares ``idempotency_level = NO_SIDE_EFFECTS``.
        serialize: turns a reply into its bytes.
        parse: turns the bytes of a stored reply into what outer interceptors expect to see.
        beside: the policies that the .proto declares beside it, or None.
    """

    name: str
    streaming: bool
    request_streaming: bool
    safe: bool
    serialize: Callable[[Any], bytes]
    parse: Callable[[bytes], Any]
    beside: Beside | None

    @classmethod
    def of(cls, name: str, handler: Handler, policies: MethodPolicies) -> "Method":
        """Learn what the handler and, where it is loaded, the method's descriptor tell."""
        safe = False
        beside: Beside | None = None
        parse: Callable[[bytes], Any] = bytes
        try:
            descriptor = descriptor_pool.Default().FindMethodByName(name[1:].replace("/", "."))
        except KeyError:
            pass  # a handler of raw bytes, or of another encoding
        else:
            safe = descriptor.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS
            parse = message_factory.GetMessageClass(descriptor.output_type).FromString
            beside = policies.of(descriptor)
        streaming = bool(handler.request_streaming or handler.response_streaming)
        serialize = handler.response_serializer or bytes
        return cls(name, streaming, bool(handler.request_streaming), safe, serialize, parse, beside)
