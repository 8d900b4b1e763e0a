"""Floor 3: one operation behind several doors, whose result each of them can tell in its own words."""

import logging
from collections.abc import Callable, Coroutine
from functools import wraps
from inspect import Signature, iscoroutinefunction, signature
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar

from resilience import wire
from resilience.admission import Admission, Refused, running_admission
from resilience.codecs import Codec
from resilience.decisions.fingerprint import fingerprint_of_values
from resilience.errors import ConfigurationError
from resilience.policies.operation import running_operation
from resilience.verdict import Reject
from resilience.wire import Reason

logger = logging.getLogger("resilience")

P = ParamSpec("P")
T = TypeVar("T")

_RESULT, _ERROR = b"=", b"!"
_PRINT = 32  # Bytes of a fingerprint.
_TEXT = ("utf-8", "surrogatepass")


def operation(
    name: str, codec: Codec[T], *, errors: tuple[type[Exception], ...] = ()
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Make a coroutine function the operation ``name``: what it returned can be told again by every door.

    Put it at the function that the handlers of both doors call, and give the policies that hold their keys the same
    ``operation`` name. A retry through the door of the first call gets the first reply, byte for byte. A retry through
    another door runs that door's handler, and in it this function returns the first result without running: so what has
    an effect belongs into this function, and none of it into the handlers around.

    With other arguments than the first time, a retry under the same key is refused. Outside of a keyed call the
    function is itself.

    Args:
        name: of the operation, one for all doors.
        codec: writes and reads the result.
        errors: what it may raise that is a final answer, too; raised again, with its text, for another door.

    Raises:
        ConfigurationError: it is no coroutine function; in a keyed call, that no policy holds the key under this name.
        TypeError: in a keyed call, that an argument can't be compared; see ``fingerprint_of_values``.
    """

    def decorate(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        if not iscoroutinefunction(function):
            raise ConfigurationError(f"{getattr(function, '__qualname__', function)} must be `async def`.")
        kept, bound = _Kept(name, codec, errors), signature(function)

        @wraps(function)
        async def run(*args: P.args, **kwargs: P.kwargs) -> T:
            admission = running_admission()
            if admission is None or not _is_keyed(admission):
                return await function(*args, **kwargs)
            print_ = fingerprint_of_values(_arguments(bound, args, kwargs))
            held = running_operation()
            if held is None or held.name != name:
                raise ConfigurationError(
                    f"{name} is called with an idempotency key that nobody holds for it: say operation={name!r} "
                    "in the IdempotencyPolicy or @idempotent of each handler that calls it."
                )
            if held.known is not None:
                return kept.tell_again(held.known, print_, admission)
            try:
                result = await function(*args, **kwargs)
            except errors as error:
                held.result = _ERROR + print_ + f"{type(error).__name__}\0{error}".encode(*_TEXT)
                raise
            held.result = _RESULT + print_ + codec.encode(result)
            return result

        return run

    return decorate


class _Kept(Generic[T]):
    """What an operation's record says of its result."""

    def __init__(self, name: str, codec: Codec[T], errors: tuple[type[Exception], ...]) -> None:
        self._name = name
        self._codec = codec
        self._errors = {kind.__name__: kind for kind in errors}

    def tell_again(self, data: bytes, print_: bytes, admission: Admission) -> T:
        """Return the first result, or raise the first error."""
        if data[1 : 1 + _PRINT] != print_:
            _refuse(
                admission, Reason.IDEMPOTENCY_PAYLOAD_MISMATCH, "This Idempotency-Key was used with another request"
            )
        body = data[1 + _PRINT :]
        try:
            if data[:1] == _RESULT:
                return self._codec.decode(body)
            kind, _, text = body.decode(*_TEXT).partition("\0")
            error = self._errors[kind](text)
        except Exception:
            # Written by another version of the application, say. It is done all the same.
            logger.exception("The kept result of %s can't be read", self._name)
            _refuse(
                admission, Reason.IDEMPOTENCY_NOT_REPLAYABLE, "This operation is done; its reply can't be shown here"
            )
        raise error


def _refuse(admission: Admission, reason: Reason, message: str) -> NoReturn:
    admission.verdict = Reject(reason, message)
    raise Refused(admission.verdict)


def _arguments(bound: Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    values = bound.bind(*args, **kwargs)
    values.apply_defaults()
    return {name: value for name, value in values.arguments.items() if name not in ("self", "cls")}


def _is_keyed(admission: Admission) -> bool:
    call = admission.call
    return not call.safe and call.metadata.get(wire.IDEMPOTENCY_KEY) is not None
