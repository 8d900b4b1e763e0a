"""The demo's HTTP door as ``module:app``, for servers' command lines, and routes that put a server to the test."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from examples.payments.guard import build_pipeline
from examples.payments.http_door import build_app
from examples.payments.service import PaymentService
from examples.payments.settings import PaymentsSettings
from resilience import HealthChecker

_settings = PaymentsSettings.load()
_store = _settings.store()
_pipeline = build_pipeline(_settings, _store)
_checker = HealthChecker("1.0.0", "servers", phase="starting")
_gate = asyncio.Event()


@contextlib.asynccontextmanager
async def _lifespan(_app: FastAPI) -> AsyncIterator[None]:
    _checker.mark_ready()
    yield
    await _pipeline.drained(5)
    await _store.aclose()
    print("The lifespan has ended.", flush=True)


app = build_app(PaymentService(_settings.processing_seconds), _pipeline, _checker)
app.router.lifespan_context = _lifespan


@app.get("/boom")
async def boom() -> None:
    raise RuntimeError("nobody handles this")


@app.get("/gated")
async def gated() -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        yield "event: first\n\n"
        await _gate.wait()
        yield "event: last\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@app.post("/gate", status_code=204)
async def gate() -> None:
    _gate.set()


@app.get("/lasting")
async def lasting() -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        yield "event: first\n\n"
        await asyncio.sleep(0.5)  # it lasts while the server is told to stop; after that nobody can tell it anything
        yield "event: last\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")
