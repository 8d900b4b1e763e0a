import logging

import pytest

from http_middleware.access_log import QuietProbes


def line(path: str, status: object) -> logging.LogRecord:
    """A record as uvicorn's protocols make it."""
    args = ("127.0.0.1:5000", "GET", path, "1.1", status)
    return logging.LogRecord("uvicorn.access", logging.INFO, "", 0, '%s - "%s %s HTTP/%s" %d', args, None)


@pytest.mark.parametrize(
    ("path", "status", "written"),
    [
        ("/health", 200, False),
        ("/health/live", 200, False),
        ("/health/ready", 204, False),
        ("/health/ready?x=1", 200, False),
        ("/health/ready", 503, True),
        ("/health/ready", 404, True),
        ("/healthy", 200, True),
        ("/payments", 200, True),
        ("/payments?next=/health", 200, True),
    ],
)
def test_a_probe_that_succeeds_leaves_no_line(path: str, status: int, written: bool) -> None:
    assert QuietProbes().filter(line(path, status)) is written


def test_probes_are_known_below_a_root_path() -> None:
    quiet = QuietProbes("/api")
    assert not quiet.filter(line("/api/health/ready", 200))
    assert quiet.filter(line("/health/ready", 200))


@pytest.mark.parametrize("args", [(), None, ("one",), {"path": "/health"}, ("a", "b", 3, "d", 200)])
def test_a_line_of_another_form_is_written(args: object) -> None:
    record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, "text", None, None)
    record.args = args  # type: ignore[assignment] # loggers put anything there
    assert QuietProbes().filter(record)
