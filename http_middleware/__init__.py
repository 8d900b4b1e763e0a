"""The HTTP door: one resilience pipeline in front of any FastAPI, Starlette or ASGI application."""

from typing import TYPE_CHECKING

from http_middleware.install import install
from http_middleware.middleware import CoreMiddleware, ResilienceMiddleware

if TYPE_CHECKING:
    from http_middleware.rate_limit import RateLimitMiddleware

__all__ = ["CoreMiddleware", "RateLimitMiddleware", "ResilienceMiddleware", "install"]


def __getattr__(name: str) -> object:
    # It reads its settings with an extra that the rest of the door does not need.
    if name == "RateLimitMiddleware":
        from http_middleware.rate_limit import RateLimitMiddleware  # noqa: PLC0415 - as above

        return RateLimitMiddleware
    raise AttributeError(name)
