"""The floor above the context: the running call's ids in the threads and jobs that it starts. Starts none itself."""

from collections.abc import Callable
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, ParamSpec, TypeVar, cast

from resilience.context import copy_context, restore_context

P = ParamSpec("P")
R = TypeVar("R")


def bind_context(fn: Callable[P, R]) -> Callable[P, R]:
    """Return ``fn`` with the context of the present call, wherever it then runs.

    For what a ContextVar does not reach: ``loop.run_in_executor``, a pool's ``submit``, a plain ``threading.Thread``.
    Each run has a context object of its own, a copy of what the present one holds now: what ``fn`` changes reaches
    neither the call nor another run. As in ``copy_context``, the deadline stays behind.

    Args:
        fn: a function or a coroutine function.
    """
    snapshot = copy_context()

    @wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with restore_context(snapshot):
            return fn(*args, **kwargs)

    @wraps(fn)
    async def run_async(*args: P.args, **kwargs: P.kwargs) -> Any:
        with restore_context(snapshot):
            return await cast("Any", fn(*args, **kwargs))

    if iscoroutinefunction(fn) or iscoroutinefunction(type(fn).__call__):
        return cast("Callable[P, R]", run_async)
    return run
