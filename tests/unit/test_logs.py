import logging
import logging.handlers
import queue
import subprocess
import sys
from collections.abc import Iterator
from contextvars import Context
from pathlib import Path

import pytest
from fastapi import FastAPI

from http_middleware import install
from resilience import Pipeline, RequestContext, RequestContextFilter, set_context_user
from resilience.context import close_context, open_context
from tests.integration.http_driver import dial, serving

ROOT = Path(__file__).parents[2]
FORMAT = "%(request_id)s %(correlation_id)s %(user_id)s %(tenant_id)s %(protocol)s %(message)s"


class Kept(logging.Handler):
    """Keeps the lines it is told to write."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.addFilter(RequestContextFilter())
        self.setFormatter(logging.Formatter(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def kept() -> Iterator[Kept]:
    handler = Kept()
    loggers = [logging.getLogger("tests.logs"), logging.getLogger("uvicorn.access")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


@pytest.fixture
def opened() -> Iterator[RequestContext]:
    context = RequestContext("req_1", "corr_1", protocol="grpc")
    token = open_context(context)
    yield context
    close_context(token)


logger = logging.getLogger("tests.logs.child")


def test_a_record_outside_of_a_call_says_so_instead_of_failing_its_format(kept: Kept) -> None:
    Context().run(logger.info, "started")
    assert kept.lines == ["- - - - - started"]


@pytest.mark.usefixtures("opened")
def test_a_record_carries_the_running_call_and_follows_its_user(kept: Kept) -> None:
    logger.info("before")
    set_context_user("ann", "acme")
    logger.info("after")
    assert kept.lines == ["req_1 corr_1 - - grpc before", "req_1 corr_1 ann acme grpc after"]


@pytest.mark.usefixtures("opened")
def test_what_the_record_has_already_stays(kept: Kept) -> None:
    logger.info("x", extra={"user_id": "mine", "request_id": "theirs"})
    assert kept.lines == ["theirs corr_1 mine - grpc x"]


def test_a_record_that_waits_in_a_queue_keeps_the_call_it_was_made_in(kept: Kept, opened: RequestContext) -> None:
    waiting: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    sender = logging.handlers.QueueHandler(waiting)
    sender.addFilter(RequestContextFilter())
    sender.handle(logger.makeRecord("x", logging.INFO, __file__, 1, "late", (), None))
    opened.set_user("somebody else by now")
    Context().run(kept.handle, waiting.get(timeout=5))
    assert kept.lines == ["req_1 corr_1 - - grpc late"]


@pytest.mark.usefixtures("opened")
def test_every_record_passes_unless_the_filter_is_given_a_name() -> None:
    record = logger.makeRecord("orders", logging.INFO, __file__, 1, "x", (), None)
    assert RequestContextFilter().filter(record) is True
    assert RequestContextFilter("orders").filter(record) is True
    assert RequestContextFilter("payments").filter(record) is False


CONFIGURED = """
import logging.config
logging.config.dictConfig({
    "version": 1,
    "filters": {"context": {"()": "resilience.RequestContextFilter"}},
    "formatters": {"line": {"format": "%(levelname)s %(request_id)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "filters": ["context"], "formatter": "line"}},
    "root": {"level": "INFO", "handlers": ["stderr"]},
})
logging.getLogger("orders").info("hello")
"""


def test_it_is_configured_by_its_name() -> None:
    # In a process of its own, since a configuration replaces every handler there is.
    process = subprocess.run([sys.executable, "-c", CONFIGURED], cwd=ROOT, check=True, capture_output=True, text=True)
    assert process.stderr == "INFO - hello\n"


async def test_uvicorns_access_log_carries_the_ids_of_its_request(kept: Kept) -> None:
    app = FastAPI()

    @app.get("/orders")
    async def orders() -> None:
        set_context_user("ann", "acme")

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("broken")

    install(app, Pipeline())

    async with serving(app) as port, dial(port) as client:
        responses = [await client.get(path, headers={"X-Correlation-ID": "chain"}) for path in ("/orders", "/broken")]

    assert [response.status_code for response in responses] == [200, 500]
    for line, response, user in zip(kept.lines, responses, ["ann acme", "- -"], strict=True):
        assert line.startswith(f"{response.headers['x-request-id']} chain {user} http 127.0.0.1:")
