"""What the demo protects, and how: one pipeline for both doors."""

from examples.payments.service import CREATE_PAYMENT
from examples.payments.settings import PaymentsSettings
from resilience import IdempotencyPolicy, Pipeline, Policy, Quota, RateLimitPolicy, Rule, Selective, Store

_PAYMENTS = "/examples.payments.v1.PaymentService"
# The import is a stream, which can't take a key: it is here so that one is refused instead of ignored.
TAKES_PAYMENTS = ("POST /api/payments", f"{_PAYMENTS}/CreatePayment", f"{_PAYMENTS}/ImportPayments")


def build_pipeline(settings: PaymentsSettings, store: Store) -> Pipeline:
    """Return one quota for each caller over everything, and keys for taking a payment, whichever door it comes to."""
    policies: list[Policy] = []
    if settings.rate_limit_enabled:
        rule = Rule(Quota(settings.rate_limit_requests, per=settings.rate_limit_window), on_outage="local")
        policies.append(RateLimitPolicy(store, rule, replicas=settings.rate_limit_replicas))
    keyed = IdempotencyPolicy(
        store,
        operation=CREATE_PAYMENT,
        ttl=settings.idempotency_ttl,
        lease=settings.idempotency_lease,
    )
    policies.append(Selective(keyed, TAKES_PAYMENTS))
    return Pipeline(policies)
