"""The gRPC door: one resilience pipeline in front of any ``grpc.aio`` server."""

from grpc_interceptors.checks import check_grpc
from grpc_interceptors.client import client_interceptors
from grpc_interceptors.health import HealthService, add_health, health_server
from grpc_interceptors.interceptor import ResilienceInterceptor
from grpc_interceptors.rate_limit_service import RateLimitService, add_rate_limit_service
from grpc_interceptors.retry import retry_service_config

__all__ = [
    "HealthService",
    "RateLimitService",
    "ResilienceInterceptor",
    "add_health",
    "add_rate_limit_service",
    "check_grpc",
    "client_interceptors",
    "health_server",
    "retry_service_config",
]
