"""Floor 4: the policies that a .proto declares beside an rpc. They mean what decorators of its handler would mean."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from resilience.admission import Admission
from resilience.decisions.idempotency import Takeover
from resilience.decorators import Declared, declared, idempotent, rate_limit
from resilience.errors import ConfigurationError
from resilience.policies.rate_limit import RateLimitPolicy
from resilience.policies.rule import Key, OnOutage, address, caller, everyone
from resilience.policies.waiting import OnTwin
from resilience.stores.memory import MemoryStore
from resilience.v1 import options_pb2
from resilience.v1.options_pb2 import Idempotency, MethodPolicy, RateLimit
from resilience.verdict import Verdict

T = TypeVar("T")

_KEYS: dict[int, Key] = {RateLimit.CALLER: caller, RateLimit.ADDRESS: address, RateLimit.EVERYONE: everyone}
_OUTAGES: dict[int, OnOutage | None] = {
    RateLimit.UNSPECIFIED: None,
    RateLimit.OPEN: "open",
    RateLimit.CLOSED: "closed",
    RateLimit.LOCAL: "local",
}
_TWINS: dict[int, OnTwin | None] = {
    Idempotency.UNSPECIFIED: None,
    Idempotency.REJECT: "reject",
    Idempotency.WAIT: "wait",
}
_TAKEOVERS: dict[int, Takeover] = {Idempotency.REEXECUTE: "reexecute", Idempotency.REFUSE: "refuse"}
_TTL, _LEASE = 86_400.0, 30.0  # The decorator's defaults, told in options.proto.
_EXTENSION: Any = options_pb2.policy  # the generated types call it any field's descriptor


class Unhonoured(NamedTuple):
    """An option that can't be honoured, found when the server was running: no call is served without it."""

    why: str

    async def admit(self, _admission: Admission) -> Verdict:
        """Raise ``ConfigurationError``."""
        raise ConfigurationError(self.why)


Beside: TypeAlias = Declared | Unhonoured
"""What is declared beside one method."""


class MethodPolicies:
    """What the options of methods declare; each method's are read once.

    Raises:
        ConfigurationError: an option of a method whose ``_pb2`` module is imported can't be honoured.
    """

    def __init__(self) -> None:
        self._read: dict[str, Beside | None] = {
            method.full_name: _declared_beside(method) for method in _imported_methods()
        }

    def of(self, method: MethodDescriptor) -> Beside | None:
        """Return what is declared beside a method, or None; one that was imported late may turn out unhonourable."""
        if method.full_name not in self._read:
            try:
                self._read[method.full_name] = _declared_beside(method)
            except ConfigurationError as error:
                self._read[method.full_name] = Unhonoured(str(error))
        return self._read[method.full_name]


def _imported_methods() -> Iterator[MethodDescriptor]:
    # A descriptor pool can't be asked what it holds, and an interceptor is not told what its server will serve. So
    # the generated modules are looked at: a servicer's base class can't be had without importing them.
    for name, module in tuple(sys.modules.items()):
        file = getattr(module, "DESCRIPTOR", None) if name.endswith("_pb2") else None
        if isinstance(file, FileDescriptor):
            for service in file.services_by_name.values():
                yield from service.methods


def _declared_beside(method: MethodDescriptor) -> Declared | None:
    # Parsed anew: options that somebody read before our extension was loaded hold it as an unknown field.
    options = MethodOptions.FromString(method.GetOptions().SerializeToString())
    if not options.HasExtension(_EXTENSION):
        return None
    told: MethodPolicy = options.Extensions[_EXTENSION]
    operation = f"/{method.containing_service.full_name}/{method.name}"
    option = ""
    try:
        _check_understood(told)
        option = ".rate_limit"
        handler = _limited(_stand_in(), told, operation)
        if told.HasField("idempotency"):
            option = ".idempotency"
            _check_keyable(method, options)
            handler = _keyed(handler, told.idempotency, operation)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{operation} can't be held to its option (resilience.v1.policy){option}: {error} "
            "Correct the .proto, and generate its code anew."
        ) from None
    return declared(handler)


def _stand_in() -> Any:
    async def handler() -> None:
        """Stand where a handler would, to be decorated."""

    return handler


def _limited(handler: Any, told: MethodPolicy, operation: str) -> Any:
    for limit in told.rate_limit:
        _check_understood(limit)
        decorate = rate_limit(
            limit.quota,
            key=_meaning(_KEYS, limit.key, "key"),
            cost=limit.cost if limit.HasField("cost") else 1,
            on_outage=_meaning(_OUTAGES, limit.on_outage, "on_outage"),
            name=limit.name or None,
        )
        handler = decorate(handler)
    known = declared(handler)
    if known is not None:
        # What a decorator would learn at the first call only: whether all of these can stand together.
        RateLimitPolicy(MemoryStore(), [make(operation) for make in known.limits])
    return handler


def _keyed(handler: Any, told: Idempotency, operation: str) -> Any:
    _check_understood(told)
    decorate = idempotent(
        _seconds(told.ttl) if told.HasField("ttl") else _TTL,
        told.required,
        operation=told.operation or None,
        lease=_seconds(told.lease) if told.HasField("lease") else _LEASE,
        takeover=_meaning(_TAKEOVERS, told.takeover, "takeover"),
        in_progress=_meaning(_TWINS, told.in_progress, "in_progress"),
    )
    handler = decorate(handler)
    known = declared(handler)
    if known is not None and known.keyed is not None:
        known.keyed(MemoryStore(), operation)  # raises where the values are out of range
    return handler


def _check_keyable(method: MethodDescriptor, options: MethodOptions) -> None:
    if method.client_streaming or method.server_streaming:
        raise ConfigurationError(
            "what is streamed can't be kept and replayed. Remove the option, or make the method unary."
        )
    if options.idempotency_level == MethodOptions.NO_SIDE_EFFECTS:
        raise ConfigurationError(
            "the method says idempotency_level = NO_SIDE_EFFECTS, and such calls take no key. Remove one of the two."
        )


def _check_understood(told: Message) -> None:
    if len(UnknownFieldSet(told)):
        raise ConfigurationError("it says more than this version of grpc-http-resilience understands; a newer one may.")


def _meaning(meanings: Mapping[int, T], number: int, field: str) -> T:
    try:
        return meanings[number]
    except KeyError:
        raise ConfigurationError(f"{number} is no {field} that this version of grpc-http-resilience knows.") from None


def _seconds(told: Duration) -> float:
    return told.seconds + told.nanos / 1e9
