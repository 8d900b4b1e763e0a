"""The HTTP door: one resilience pipeline in front of any FastAPI, Starlette or ASGI application."""

from http_middleware.install import install
from http_middleware.middleware import CoreMiddleware, ResilienceMiddleware

__all__ = ["CoreMiddleware", "ResilienceMiddleware", "install"]
