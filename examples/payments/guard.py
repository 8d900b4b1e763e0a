"""What the demo protects, and how: one pipeline for both doors."""

from examples.payments.settings import PaymentsSettings
from resilience import IdempotencyPolicy, Pipeline, Policy, Quota, RateLimitPolicy, Rule, Selective, Store

CREATE_PAYMENT = ("POST /api/payments", "/examples.payments.v1.PaymentService/CreatePayment")


def build_pipeline(settings: PaymentsSettings, store: Store) -> Pipeline:
    """Return one quota for each caller over everything, and keys for taking a payment, whichever door it comes to."""
    policies: list[Policy] = []
    if settings.rate_limit_enabled:
        rule = Rule(Quota(settings.rate_limit_requests, per=settings.rate_limit_window), on_outage="local")
        policies.append(RateLimitPolicy(store, rule, replicas=settings.rate_limit_replicas))
    keyed = IdempotencyPolicy(
        store,
        operation="create_payment",
        ttl=settings.idempotency_ttl,
        lease=settings.idempotency_lease,
    )
    policies.append(Selective(keyed, CREATE_PAYMENT))
    return Pipeline(policies)
