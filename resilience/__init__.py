"""One resilience core for services that speak gRPC and HTTP: limits, idempotency, request context, health.

The doors are ``http_middleware`` and ``grpc_interceptors``; this package imports neither, nor what they need.
"""

from resilience.admission import Admission, Policy
from resilience.background import bind_context
from resilience.call import Call, Metadata
from resilience.caller import api_key, by_user
from resilience.checks import (
    EventLoopLag,
    check_database,
    check_disk,
    check_http,
    check_redis,
    check_store,
    check_tcp,
)
from resilience.context import (
    ContextSnapshot,
    RequestContext,
    add_request_context,
    copy_context,
    get_correlation_id,
    get_request_context,
    get_request_id,
    get_tracing_headers,
    restore_context,
    set_context_user,
)
from resilience.decisions.idempotency import generate_idempotency_key
from resilience.decisions.idempotency_record import Standing
from resilience.decisions.quota import Quota, Usage
from resilience.decisions.readiness import HealthStatus
from resilience.decorators import idempotent, rate_limit
from resilience.errors import (
    ConfigurationError,
    ForeignValueError,
    PayloadTooLargeError,
    ResilienceError,
    StoreUnavailableError,
)
from resilience.health import ComponentHealth, HealthChecker, HealthReport
from resilience.logs import RequestContextFilter
from resilience.pipeline import Pipeline
from resilience.policies.idempotency import IdempotencyPolicy
from resilience.policies.operation import RunningOperation, running_operation
from resilience.policies.rate_limit import RateLimitPolicy
from resilience.policies.records import IdempotencyRecords
from resilience.policies.request_context import RequestContextPolicy
from resilience.policies.rule import Rule
from resilience.policies.selective import Selective
from resilience.shared_operation import operation
from resilience.stores.base import IdempotencyStore, RateLimitStore, Store
from resilience.stores.memory import MemoryStore
from resilience.verdict import PROCEED, Outcome, Reject, Replay, Reply, Verdict
from resilience.wire import Reason

__all__ = [
    "PROCEED",
    "Admission",
    "Call",
    "ComponentHealth",
    "ConfigurationError",
    "ContextSnapshot",
    "EventLoopLag",
    "ForeignValueError",
    "HealthChecker",
    "HealthReport",
    "HealthStatus",
    "IdempotencyPolicy",
    "IdempotencyRecords",
    "IdempotencyStore",
    "MemoryStore",
    "Metadata",
    "Outcome",
    "PayloadTooLargeError",
    "Pipeline",
    "Policy",
    "Quota",
    "RateLimitPolicy",
    "RateLimitStore",
    "Reason",
    "Reject",
    "Replay",
    "Reply",
    "RequestContext",
    "RequestContextFilter",
    "RequestContextPolicy",
    "ResilienceError",
    "Rule",
    "RunningOperation",
    "Selective",
    "Standing",
    "Store",
    "StoreUnavailableError",
    "Usage",
    "Verdict",
    "add_request_context",
    "api_key",
    "bind_context",
    "by_user",
    "check_database",
    "check_disk",
    "check_http",
    "check_redis",
    "check_store",
    "check_tcp",
    "copy_context",
    "generate_idempotency_key",
    "get_correlation_id",
    "get_request_context",
    "get_request_id",
    "get_tracing_headers",
    "idempotent",
    "operation",
    "rate_limit",
    "restore_context",
    "running_operation",
    "set_context_user",
]
