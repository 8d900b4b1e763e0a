"""The HTTP door: one resilience pipeline in front of any FastAPI, Starlette or ASGI application."""

from typing import TYPE_CHECKING

from http_middleware.core import CoreMiddleware
from http_middleware.decorators import idempotent, rate_limit
from http_middleware.guard import IdempotencyGuard, get_idempotency_guard, require_idempotency_key
from http_middleware.install import install
from http_middleware.middleware import ResilienceMiddleware
from http_middleware.request_context import RequestContextMiddleware
from resilience.decisions.idempotency import generate_idempotency_key

if TYPE_CHECKING:
    from http_middleware.idempotency import IdempotencyMiddleware
    from http_middleware.limiter import RateLimitMiddleware

__all__ = [
    "CoreMiddleware",
    "IdempotencyGuard",
    "IdempotencyMiddleware",
    "RateLimitMiddleware",
    "RequestContextMiddleware",
    "ResilienceMiddleware",
    "generate_idempotency_key",
    "get_idempotency_guard",
    "idempotent",
    "install",
    "rate_limit",
    "require_idempotency_key",
]


def __getattr__(name: str) -> object:
    # They read their settings with an extra that the rest of the door does not need.
    if name == "IdempotencyMiddleware":
        from http_middleware.idempotency import IdempotencyMiddleware  # noqa: PLC0415 - as above

        return IdempotencyMiddleware
    if name == "RateLimitMiddleware":
        from http_middleware.limiter import RateLimitMiddleware  # noqa: PLC0415 - as above

        return RateLimitMiddleware
    raise AttributeError(name)
