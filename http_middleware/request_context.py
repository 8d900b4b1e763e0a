"""Floor 4: ids and the request context alone, for ``app.add_middleware``."""

from starlette.types import ASGIApp

from http_middleware.middleware import ResilienceMiddleware


class RequestContextMiddleware(ResilienceMiddleware):
    """Gives every request its ids, and every reply: ``app.add_middleware(RequestContextMiddleware)``.

    Wherever it is added: unhandled errors, their handlers and the server's access log have the ids, too.

    Args:
        app: the application inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app)
