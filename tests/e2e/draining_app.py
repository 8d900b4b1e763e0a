"""An application that somebody else's command line serves, and which drains by itself."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from http_middleware import install
from resilience import HealthChecker
from resilience.lifecycle import drain_on_signals

checker = HealthChecker(phase="starting")


@asynccontextmanager
async def _lifespan(_app: FastAPI) -> AsyncIterator[None]:
    with drain_on_signals(checker, float(os.environ["HEALTH_DRAIN_SECONDS"])):
        checker.mark_ready()
        yield
    print("The lifespan has ended.", flush=True)


app = FastAPI(lifespan=_lifespan)
install(app, health=checker)


@app.get("/")
async def root() -> int:
    return os.getpid()
