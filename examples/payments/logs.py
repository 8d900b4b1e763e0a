"""The demo's logs: one JSON object a line, with the ids of the call it belongs to, whoever logs."""

import logging
import sys

import structlog

from http_middleware.access_log import QuietProbes
from resilience import add_request_context


def configure_logs() -> None:
    """Send structlog's and the standard library's events through one chain to standard error."""
    shared: list[structlog.typing.Processor] = [
        add_request_context,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processor=structlog.processors.JSONRenderer())
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").addFilter(QuietProbes())
