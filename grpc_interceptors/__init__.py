"""The gRPC door: one resilience pipeline in front of any ``grpc.aio`` server."""

from grpc_interceptors.health import HealthService, add_health
from grpc_interceptors.interceptor import ResilienceInterceptor

__all__ = ["HealthService", "ResilienceInterceptor", "add_health"]
