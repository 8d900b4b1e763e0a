"""The demo's HTTP door as ``module:app``, for the command lines of servers."""

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from examples.payments.guard import build_pipeline
from examples.payments.http_door import build_app
from examples.payments.service import PaymentService
from examples.payments.settings import PaymentsSettings
from resilience import HealthChecker

_settings = PaymentsSettings.load()
_store = _settings.store()
_pipeline = build_pipeline(_settings, _store)
_checker = HealthChecker("1.0.0", "servers", phase="starting")


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
