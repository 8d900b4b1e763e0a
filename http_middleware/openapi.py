"""Floor 4: which operations of an application's OpenAPI page a pipeline concerns, and how.

Asked once for a page, never for a request.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, RouteContext, iter_route_contexts

from http_middleware.guard import get_idempotency_guard, require_idempotency_key
from http_middleware.openapi_page import Json, write_operation
from resilience.admission import Policy
from resilience.decorators import declared
from resilience.pipeline import Pipeline
from resilience.policies.idempotency import IdempotencyPolicy
from resilience.policies.rate_limit import RateLimitPolicy
from resilience.policies.request_context import RequestContextPolicy
from resilience.policies.selective import Selective
from resilience.stores.base import Store
from resilience.wire import Reason

_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # Source: RFC 9110, 9.2.1.
_FINE: frozenset[Reason] = frozenset()
_LIMITED = frozenset({Reason.RATE_LIMITED})
_OUTAGE = frozenset({Reason.STORE_UNAVAILABLE})
_ABANDONED = frozenset({Reason.IDEMPOTENCY_ABANDONED})
_KEY_REFUSED = frozenset({Reason.IDEMPOTENCY_KEY_MISSING, Reason.IDEMPOTENCY_KEY_MALFORMED})
_KEYED = frozenset(
    {
        Reason.IDEMPOTENCY_KEY_MALFORMED,
        Reason.IDEMPOTENCY_IN_PROGRESS,
        Reason.IDEMPOTENCY_PAYLOAD_MISMATCH,
        Reason.IDEMPOTENCY_NOT_REPLAYABLE,
        Reason.PAYLOAD_TOO_LARGE,
    }
)


def document(app: FastAPI, pipeline: Pipeline) -> None:
    """Have an application's OpenAPI page tell of the pipeline, too.

    Adds the refusals, the ``Idempotency-Key`` and the response headers that concern each operation. Call it again
    after ``app.openapi`` was replaced; what was said once is not said twice.

    Args:
        app: its routes may still change.
        pipeline: what guards it.
    """
    present = app.openapi
    if not (isinstance(present, _Documented) and present.pipeline is pipeline):
        app.openapi = _Documented(app, pipeline, present)  # type: ignore[method-assign] # As FastAPI's own manual does.


class _Documented:
    """Stands for ``app.openapi``: the page that it makes, completed once for each page it makes."""

    def __init__(self, app: FastAPI, pipeline: Pipeline, original: Callable[[], Json]) -> None:
        self.pipeline = pipeline
        self._app = app
        self._original = original
        self._completed: Json | None = None

    def __call__(self) -> Json:
        page = self._original()
        if page is not self._completed:
            for context in iter_route_contexts(self._app.routes):
                if isinstance(context.original_route, APIRoute) and context.include_in_schema:
                    self._complete(page, context)
            self._completed = page
        return page

    def _complete(self, page: Json, context: RouteContext) -> None:
        path = context.path_format or ""
        item: Json = page.get("paths", {}).get(path, {})
        methods = context.methods or set()
        called = (context.endpoint, *_dependencies(context.dependant))
        for method in sorted(methods.intersection(map(str.upper, item))):
            # As the route table names it.
            counted_as = "GET" if method == "HEAD" and "GET" in methods else method
            operation = f"{counted_as} {path}"
            policies = list(_concerning((*self.pipeline.edge, *self.pipeline.core), operation))
            policies += _late(called, self.pipeline.store, operation)
            reasons = _FINE.union(*(_reasons(policy, operation, safe=method in _SAFE) for policy in policies))
            if any(one is require_idempotency_key for one in called):
                reasons |= _KEY_REFUSED
            traced = any(isinstance(policy, RequestContextPolicy) for policy in policies)
            write_operation(page, item, item[method.lower()], reasons, traced=traced)


def _concerning(policies: Iterable[Policy], operation: str) -> Iterator[Policy]:
    for policy in policies:
        inner: Policy | None = getattr(policy, "policy", None)
        if inner is None:
            yield policy
        elif not isinstance(policy, Selective) or operation in policy.operations:
            yield from _concerning([inner], operation)


def _late(called: Iterable[Any], store: Store, operation: str) -> Iterator[Policy]:
    """Yield the policies that a handler and what it depends on bring."""
    for one in called:
        known = declared(one)
        if known is not None:
            yield from (RateLimitPolicy(store, make(operation)) for make in known.limits)
            if known.keyed is not None:
                yield known.keyed(store, operation)
        if one is get_idempotency_guard:
            yield IdempotencyPolicy(store)


def _dependencies(dependant: Dependant) -> Iterator[Any]:
    for inner in dependant.dependencies:
        yield inner.call
        yield from _dependencies(inner)


def _reasons(policy: Policy, operation: str, *, safe: bool) -> frozenset[Reason]:
    """Return why a policy may refuse an operation."""
    if isinstance(policy, RateLimitPolicy):
        denying = [rule for rule in policy.rules if not rule.shadow]
        ways = [
            rule.on_outage or policy.on_outage
            for rule in denying
            if rule.operations is None or operation in rule.operations
        ]
        return (_LIMITED if ways else _FINE) | (_OUTAGE if "closed" in ways else _FINE)
    if isinstance(policy, IdempotencyPolicy) and not safe:
        required = _KEY_REFUSED if policy.required else _FINE
        refuses = _ABANDONED if policy.takeover == "refuse" else _FINE
        return _KEYED | required | refuses | (_OUTAGE if policy.on_outage == "closed" else _FINE)
    return _FINE
