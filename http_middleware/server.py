"""Floor 4: uvicorn as one of the servers of ``resilience.lifecycle.run``. Needs uvicorn."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from resilience.errors import ConfigurationError


class UvicornServer:
    """Serves an ASGI application on one port, and leaves the signals to ``run``.

    The application's lifespan ends with this server: what work of another door, or keyed work, still needs then is
    opened around ``run`` rather than in it.

    Args:
        app: the application.
        host: the address to listen on.
        port: 0 to 65535; 0 takes a free one.
        name: what an error calls the port, such as the setting that chose it.
        options: what ``uvicorn.Config`` takes beside these. A lifespan that fails stops the start, unless ``lifespan``
            says otherwise.
    """

    def __init__(
        self, app: ASGIApp, *, host: str = "127.0.0.1", port: int = 8000, name: str = "HTTP", **options: Any
    ) -> None:
        self.port = port
        """The port; once started, the one that was taken."""
        self._host = host
        self._name = name
        self._server = _Server(uvicorn.Config(app, **{"lifespan": "on", **options}))
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind the port, start the application, and serve.

        Raises:
            ConfigurationError: the port can't be had, or the application did not start.
        """
        self._server.config.load()
        bound = self._bind()
        self.port = bound.getsockname()[1]
        task = self._task = asyncio.create_task(self._serve(bound))
        serving = asyncio.create_task(self._server.serving.wait())
        try:
            await asyncio.wait({task, serving}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise
        finally:
            serving.cancel()
        if task.done():
            task.result()

    async def stop(self, grace: float | None) -> None:
        """Take no more connections, and let requests run on for at most ``grace`` seconds, rounded up."""
        self._server.config.timeout_graceful_shutdown = ceil(grace or 0)
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait({self._task})

    async def wait_for_termination(self) -> None:
        """Return when the server has ended, or raise what ended it."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def _serve(self, bound: socket.socket) -> None:
        with bound:
            try:
                await self._server.serve([bound])
            except OSError as error:
                if self._server.serving.is_set():
                    raise
                raise self._unusable(error) from None  # somebody has come to listen since it was bound

    def _bind(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        # Named, because asyncio turns Nagle's algorithm off only where it reads that the protocol is TCP.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if os.name == "posix":  # elsewhere it would let two share the port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((self._host, self.port))
        except OSError as error:
            bound.close()
            raise self._unusable(error) from None
        return bound

    def _unusable(self, error: OSError) -> ConfigurationError:
        return ConfigurationError(f"{self._name}: port {self.port} can't be used ({error.strerror}); choose another.")


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own, with a word when it serves, and failing as any coroutine does."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.serving = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:  # of newer versions; older ones say that they should exit
            self.should_exit = True
        except OSError:
            await self.lifespan.shutdown()
            raise
        if self.should_exit:
            raise ConfigurationError("The application did not start; the log says why.")
        self.serving.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
