"""The floor above the context: the running call's ids on the standard library's log records. Formats and sends none."""

from logging import Filter, LogRecord

from resilience.context import LOGGED, get_request_context

_NOTHING = dict.fromkeys(LOGGED, "-")


class RequestContextFilter(Filter):
    """Puts request_id, correlation_id, user_id, tenant_id and protocol on each record; ``-`` for what is not known.

    What the record has already, as from ``extra=``, stays. Add it to handlers: a logger's own filter doesn't see the
    records of its children. With ``logging.config.dictConfig``::

        "filters": {"context": {"()": "resilience.RequestContextFilter"}},
        "formatters": {"line": {"format": "%(levelname)s %(request_id)s %(message)s"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "filters": ["context"], "formatter": "line"}},

    Uvicorn's access log has the ids, too, where the door is outermost, as ``install`` makes it.

    Args:
        name: of the only loggers whose records pass, as of any ``logging.Filter``; the default lets every record pass.
    """

    def filter(self, record: LogRecord) -> bool:
        """Complete the record."""
        for name, value in (_NOTHING | get_request_context().log_fields()).items():
            record.__dict__.setdefault(name, value)
        return bool(super().filter(record))
