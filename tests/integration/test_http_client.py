from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from http_middleware import install
from http_middleware.client import async_tracing_hook, tracing_hook
from resilience import ConfigurationError, Pipeline, RequestContext, RequestContextPolicy, get_request_context
from resilience.context import close_context, open_context
from resilience.testing import ManualClock
from tests.integration.http_driver import connect, dial, serving

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OTHER_TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CARRIED = {
    "x-request-id": "req_1",
    "x-correlation-id": "corr_1",
    "x-request-timeout-ms": "2000",
    "traceparent": TRACEPARENT,
    "tracestate": "a=1",
}


class Network:
    """Every host there is. Notes which of our names each request carried; redirects where it is told to.

    Args:
        clock: moved on by a second for each request.
        redirects: from one address to the next.
    """

    def __init__(self, clock: ManualClock | None = None, **redirects: str) -> None:
        self.got: list[tuple[str, dict[str, str]]] = []
        self._clock = clock or ManualClock()
        self._redirects = redirects

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer."""
        sent = {name: request.headers[name] for name in CARRIED if name in request.headers}
        self.got.append((request.url.host, sent))
        self._clock.advance(1.0)
        target = self._redirects.get(request.url.path.strip("/"))
        return httpx.Response(302, headers={"location": target}) if target else httpx.Response(200)

    def client(self, *allowed_hosts: str, **options: Any) -> httpx.Client:
        """Return a client of this network, with the hook under test."""
        hooks = {"request": [tracing_hook(allowed_hosts=allowed_hosts)]}
        return httpx.Client(transport=httpx.MockTransport(self), event_hooks=hooks, **options)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(autouse=True)
def opened(clock: ManualClock) -> Iterator[RequestContext]:
    context = RequestContext(
        "req_1",
        "corr_1",
        user_id="ann",
        tenant_id="acme",
        protocol="http",
        traceparent=TRACEPARENT,
        tracestate="a=1",
    )
    context.set_deadline(clock() + 2.0, clock)
    token = open_context(context)
    yield context
    close_context(token)


@pytest.mark.parametrize(
    ("allowed", "url"),
    [
        ("orders", "http://orders/api/orders"),
        ("orders", "http://orders:8080/"),
        ("orders", "https://ORDERS/"),
        ("Orders.Internal.Example", "http://orders.internal.example/"),
        (".internal.example", "http://orders.internal.example/"),
        (".Internal.Example", "http://a.b.INTERNAL.example/"),
        ("order_service", "http://order_service/"),
        ("127.0.0.1", "http://127.0.0.1:8000/"),
        ("::1", "http://[::1]:8000/"),
    ],
)
def test_a_host_that_is_allowed_gets_the_running_call(allowed: str, url: str) -> None:
    network = Network()

    with network.client("elsewhere.example", allowed) as client:
        client.get(url)

    assert [sent for _, sent in network.got] == [CARRIED]


@pytest.mark.parametrize(
    ("allowed", "url"),
    [
        ("orders", "http://payments/"),
        ("orders", "http://orders.evil.example/"),
        ("orders", "http://evil.example/orders"),
        ("orders", "http://orders@evil.example/"),
        (".internal.example", "http://internal.example/"),
        (".internal.example", "http://evilinternal.example/"),
        (".internal.example", "http://internal.example.evil.example/"),
        ("api.example.com", "http://apixexample.com/"),
    ],
)
def test_any_other_host_gets_nothing(allowed: str, url: str) -> None:
    network = Network()

    with network.client(allowed) as client:
        client.get(url)

    assert [sent for _, sent in network.got] == [{}]


def test_where_no_host_is_allowed_nothing_is_sent() -> None:
    network = Network()

    with network.client() as client:
        client.get("http://orders/")

    assert network.got == [("orders", {})]


def test_a_custom_host_header_opens_nothing() -> None:
    network = Network()

    with network.client("orders") as client:
        client.get("http://evil.example/", headers={"Host": "orders"})

    assert network.got == [("evil.example", {})]


def test_outside_of_a_call_nothing_is_sent() -> None:
    network = Network()
    token = open_context(RequestContext())

    with network.client("orders") as client:
        client.get("http://orders/")

    close_context(token)
    assert network.got == [("orders", {})]


def test_a_redirect_to_another_host_takes_nothing_along() -> None:
    network = Network(old="http://evil.example/")

    with network.client("orders", follow_redirects=True) as client:
        client.get("http://orders/old")

    assert network.got == [("orders", CARRIED), ("evil.example", {})]


def test_a_redirect_among_allowed_hosts_is_told_what_is_left_of_the_deadline_by_then(clock: ManualClock) -> None:
    network = Network(clock, old="http://payments/new", new="http://orders/newest")

    with network.client("orders", "payments", follow_redirects=True) as client:
        client.get("http://orders/old")

    assert network.got == [
        ("orders", CARRIED),
        ("payments", {**CARRIED, "x-request-timeout-ms": "1000"}),
        ("orders", {**CARRIED, "x-request-timeout-ms": "1"}),
    ]


def test_a_header_that_the_application_set_itself_stays_through_redirects_too() -> None:
    network = Network(old="http://payments/new", new="http://evil.example/")
    mine = {"X-Correlation-ID": "mine", "X-Request-Timeout-Ms": "50"}

    with network.client("orders", "payments", follow_redirects=True) as client:
        client.get("http://orders/old", headers=mine)

    kept = {"x-correlation-id": "mine", "x-request-timeout-ms": "50"}
    assert network.got == [("orders", {**CARRIED, **kept}), ("payments", {**CARRIED, **kept}), ("evil.example", kept)]


def test_a_header_that_another_hook_changed_after_ours_stays() -> None:
    network = Network(old="http://evil.example/")

    def rename(request: httpx.Request) -> None:
        request.headers["X-Correlation-ID"] = "renamed"

    with network.client("orders", follow_redirects=True) as client:
        client.event_hooks["request"] += [rename]
        client.get("http://orders/old")

    assert network.got[1] == ("evil.example", {"x-correlation-id": "renamed"})


def test_the_applications_own_trace_never_gets_our_tracestate() -> None:
    network = Network()

    with network.client("orders") as client:
        client.get("http://orders/", headers={"traceparent": OTHER_TRACEPARENT})

    sent = dict(network.got[0][1])
    assert sent.pop("traceparent") == OTHER_TRACEPARENT
    assert "tracestate" not in sent


def test_the_user_and_the_tenant_are_never_sent() -> None:
    requests: list[httpx.Request] = []

    def note(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200)

    hooks = {"request": [tracing_hook(allowed_hosts=["orders"])]}
    with httpx.Client(transport=httpx.MockTransport(note), event_hooks=hooks) as client:
        client.get("http://orders/")

    assert not {"ann", "acme"} & set(requests[0].headers.values())


async def test_an_async_client_sends_the_same() -> None:
    network = Network(old="http://evil.example/")
    hooks = {"request": [async_tracing_hook(allowed_hosts={"orders"})]}

    async with httpx.AsyncClient(
        transport=httpx.MockTransport(network), event_hooks=hooks, follow_redirects=True
    ) as client:
        await client.get("http://orders/old")

    assert network.got == [("orders", CARRIED), ("evil.example", {})]


@pytest.mark.parametrize(
    "wrong",
    ["", ".", "*", "*.example.com", "http://orders", "orders:8080", "orders/api", "a b", "a@b", "[::1]", "a..b"],
)
@pytest.mark.parametrize("make", [tracing_hook, async_tracing_hook])
def test_an_allowed_host_that_would_match_nothing_is_refused_at_once(make: Any, wrong: str) -> None:
    with pytest.raises(ConfigurationError, match="allowed_hosts"):
        make(allowed_hosts=["orders", wrong])


def test_a_single_string_is_not_taken_apart_into_letters() -> None:
    with pytest.raises(ConfigurationError, match="allowed_hosts"):
        tracing_hook(allowed_hosts="orders")


async def test_one_chain_and_one_deadline_run_through_two_services_over_a_real_connection() -> None:
    clock = ManualClock()
    behind, front = FastAPI(), FastAPI()

    @behind.get("/")
    async def last() -> dict[str, Any]:
        context = get_request_context()
        return {
            "parent": context.parent_request_id,
            "correlation": context.correlation_id,
            "remaining": context.remaining(),
            "user": context.user_id,
        }

    @front.get("/")
    async def first() -> Any:
        get_request_context().set_user("ann", "acme")
        clock.advance(0.5)
        return (await client.get("/")).json()

    for app in (behind, front):
        install(app, Pipeline(edge=[RequestContextPolicy(clock=clock)]))

    hooks = {"request": [async_tracing_hook(allowed_hosts={"127.0.0.1"})]}
    async with serving(behind) as port, dial(port, event_hooks=hooks) as client:
        response = await connect(front).get("/", headers={"X-Correlation-ID": "chain", "X-Request-Timeout-Ms": "2000"})

    assert response.json() == {
        "parent": response.headers["x-request-id"],
        "correlation": "chain",
        "remaining": 1.5,
        "user": None,
    }
