"""Floor 4: the core's decorators on FastAPI endpoints. Only what streams needs more than they give.

FastAPI has sent the status before it asks a generator for its first item. So a streaming endpoint asks as a dependency
does: before anything leaves.
"""

import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

from fastapi import Depends

from resilience import decorators
from resilience.admission import running_admission
from resilience.decisions.quota import Quota
from resilience.decorators import Declared, declared, idempotent, let_pass
from resilience.policies.rule import Key, OnOutage, caller

__all__ = ["idempotent", "rate_limit"]

F = TypeVar("F", bound=Callable[..., Any])
_HIDDEN = "resilience_admitted"


def rate_limit(
    max_requests: int | str | Quota,
    window_seconds: float = 60.0,
    *,
    key: Key = caller,
    cost: int = 1,
    on_outage: OnOutage | None = None,
    name: str | None = None,
) -> Callable[[F], F]:
    """Limit one endpoint. See ``resilience.rate_limit``, which does the same for what does not stream."""
    limit = decorators.rate_limit(max_requests, window_seconds, key=key, cost=cost, on_outage=on_outage, name=name)

    def decorate(endpoint: F) -> F:
        guarded = limit(endpoint)
        known = declared(guarded)
        if known is None or not (inspect.isasyncgenfunction(endpoint) or inspect.isgeneratorfunction(endpoint)):
            return guarded
        streaming: F = _before_the_stream(known, guarded)
        return streaming

    return decorate


def _before_the_stream(known: Declared, guarded: Any) -> Any:
    async def admitted() -> None:
        admission = running_admission()
        if admission is not None:
            let_pass(await known.admit(admission))

    function = known.function

    async def items(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        kwargs.pop(_HIDDEN, None)
        async for item in function(*args, **kwargs):
            yield item

    def items_of_thread(*args: Any, **kwargs: Any) -> Iterator[Any]:
        kwargs.pop(_HIDDEN, None)
        yield from function(*args, **kwargs)

    streaming: Any = wraps(guarded)(items if inspect.isasyncgenfunction(function) else items_of_thread)
    signature = inspect.signature(function)
    hidden = inspect.Parameter(_HIDDEN, inspect.Parameter.KEYWORD_ONLY, default=Depends(admitted), annotation=None)
    parameters = list(signature.parameters.values())
    takes_any = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    parameters.insert(len(parameters) - takes_any, hidden)
    streaming.__signature__ = signature.replace(parameters=parameters)
    streaming.__wrapped__ = function
    return streaming
