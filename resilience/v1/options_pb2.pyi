from google.protobuf import descriptor_pb2 as _descriptor_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor
POLICY_FIELD_NUMBER: _ClassVar[int]
policy: _descriptor.FieldDescriptor

class MethodPolicy(_message.Message):
    __slots__ = ("rate_limit", "idempotency")
    RATE_LIMIT_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_FIELD_NUMBER: _ClassVar[int]
    rate_limit: _containers.RepeatedCompositeFieldContainer[RateLimit]
    idempotency: Idempotency
    def __init__(self, rate_limit: _Optional[_Iterable[_Union[RateLimit, _Mapping]]] = ..., idempotency: _Optional[_Union[Idempotency, _Mapping]] = ...) -> None: ...

class RateLimit(_message.Message):
    __slots__ = ("quota", "key", "cost", "on_outage", "name")
    class Key(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        CALLER: _ClassVar[RateLimit.Key]
        ADDRESS: _ClassVar[RateLimit.Key]
        EVERYONE: _ClassVar[RateLimit.Key]
    CALLER: RateLimit.Key
    ADDRESS: RateLimit.Key
    EVERYONE: RateLimit.Key
    class OnOutage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[RateLimit.OnOutage]
        OPEN: _ClassVar[RateLimit.OnOutage]
        CLOSED: _ClassVar[RateLimit.OnOutage]
        LOCAL: _ClassVar[RateLimit.OnOutage]
    UNSPECIFIED: RateLimit.OnOutage
    OPEN: RateLimit.OnOutage
    CLOSED: RateLimit.OnOutage
    LOCAL: RateLimit.OnOutage
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    ON_OUTAGE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    quota: str
    key: RateLimit.Key
    cost: int
    on_outage: RateLimit.OnOutage
    name: str
    def __init__(self, quota: _Optional[str] = ..., key: _Optional[_Union[RateLimit.Key, str]] = ..., cost: _Optional[int] = ..., on_outage: _Optional[_Union[RateLimit.OnOutage, str]] = ..., name: _Optional[str] = ...) -> None: ...

class Idempotency(_message.Message):
    __slots__ = ("required", "ttl", "lease", "in_progress", "takeover", "operation")
    class InProgress(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[Idempotency.InProgress]
        REJECT: _ClassVar[Idempotency.InProgress]
        WAIT: _ClassVar[Idempotency.InProgress]
    UNSPECIFIED: Idempotency.InProgress
    REJECT: Idempotency.InProgress
    WAIT: Idempotency.InProgress
    class Takeover(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REEXECUTE: _ClassVar[Idempotency.Takeover]
        REFUSE: _ClassVar[Idempotency.Takeover]
    REEXECUTE: Idempotency.Takeover
    REFUSE: Idempotency.Takeover
    REQUIRED_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    IN_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    TAKEOVER_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    required: bool
    ttl: _duration_pb2.Duration
    lease: _duration_pb2.Duration
    in_progress: Idempotency.InProgress
    takeover: Idempotency.Takeover
    operation: str
    def __init__(self, required: bool = ..., ttl: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., lease: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., in_progress: _Optional[_Union[Idempotency.InProgress, str]] = ..., takeover: _Optional[_Union[Idempotency.Takeover, str]] = ..., operation: _Optional[str] = ...) -> None: ...
