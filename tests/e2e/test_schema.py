"""The demo's HTTP door against its own OpenAPI page: whatever is sent, what comes back is what the page says.

Limits are off, or most of the replies would be refusals. The same cases are drawn in each run.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from examples.payments.guard import build_pipeline
from examples.payments.http_door import build_app
from examples.payments.service import PaymentService
from examples.payments.settings import PaymentsSettings
from resilience import HealthChecker
from resilience.stores.memory import MemoryStore

# Not that wrong data is refused: pydantic takes "100" and true for numbers, which is between it and the page.
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.positive_data_acceptance,
]
# Good ones that come again, for replays and for keys with another payload; bad ones, and what a client can put on a
# header line.
KEYS = (
    st.none()
    | st.sampled_from(["a", "b", "c", "two words", "k" * 300])
    | st.text(st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_categories=["Cc", "Zs"]), min_size=1)
)


@pytest.fixture
def api() -> Iterator[Any]:
    """Return the schema of an application of its own, with no word in the log for each of its thousands of calls."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    limitless = PaymentsSettings(rate_limit_enabled=False, redis_url=None)
    app = build_app(PaymentService(0), build_pipeline(limitless, MemoryStore()), HealthChecker("1.0.0"))
    yield schemathesis.openapi.from_asgi("/openapi.json", app, config=schemathesis.Config())
    structlog.reset_defaults()


def fuzz(api: Any, examples: int) -> Counter[tuple[str, int]]:
    """Hold about ``examples`` replies to the page; return how often each operation answered what."""
    payment = api["/api/payments"]["POST"].Case(body={"amount": 100, "currency": "EUR"}).call().json()["id"]
    operations = [operation.ok() for operation in api.get_all_operations()]
    # Any text will do for a path's parameter, so there is nothing to get wrong without a body.
    draws = [(one, mode) for one in operations for mode in (GenerationMode if one.body else [GenerationMode.POSITIVE])]
    seen: Counter[tuple[str, int]] = Counter()

    for operation, mode in draws:
        cases = operation.as_strategy(generation_mode=mode)

        @settings(
            max_examples=examples // len(draws),
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(case=cases, key=KEYS, known=st.booleans())
        def hold(case: Any, key: str | None, known: bool) -> None:
            if known and "payment_id" in case.path_parameters:
                case.path_parameters["payment_id"] = payment
            if key is not None:
                case.headers["idempotency-key"] = key
            reply = case.call()
            seen[case.operation.label, reply.status_code] += 1
            # A key may be refused beside a body that is fine; the page tells of the header, so some are drawn from it.
            case.validate_response(reply, checks=CHECKS[:-1] if "idempotency-key" in case.headers else CHECKS)

        hold()
    return seen


def test_what_comes_back_is_what_the_page_says(api: Any) -> None:
    seen = fuzz(api, 100)
    assert {label for label, status in seen} == {operation.ok().label for operation in api.get_all_operations()}


@pytest.mark.slow
def test_what_comes_back_is_what_the_page_says_thousands_of_times(api: Any) -> None:
    seen = fuzz(api, 4000)
    assert seen.total() > 2000
    assert {status for label, status in seen if label == "POST /api/payments"} >= {201, 400, 422}
    assert {status for label, status in seen if label.startswith("GET")} >= {200, 404}
