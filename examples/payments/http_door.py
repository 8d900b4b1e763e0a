"""The demo's HTTP door."""

import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from examples.payments.service import InvalidPaymentError, Payment, PaymentService, UnknownPaymentError
from http_middleware import install
from resilience import HealthChecker, Pipeline


class PaymentCreate(BaseModel):
    """A payment to take."""

    amount: int = Field(gt=0, le=10**12, description="In the currency's minor unit.", examples=[100])
    currency: str = Field(pattern="^[A-Z]{3}$", description="ISO 4217, three capitals.", examples=["EUR"])


class PaymentRead(PaymentCreate):
    """A payment that was taken."""

    id: str
    status: str


class Refusal(BaseModel):
    """Why there is no payment."""

    detail: str


_UNREADABLE: dict[int | str, dict[str, Any]] = {400: {"model": Refusal, "description": "The body is not readable"}}
_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Refusal, "description": "No such payment"}}
_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}, **_UNKNOWN}


def build_app(service: PaymentService, pipeline: Pipeline, checker: HealthChecker) -> FastAPI:
    """Return the guarded application."""
    app = FastAPI(title="Payments", version=checker.version)

    @app.exception_handler(InvalidPaymentError)
    async def invalid(_request: Request, error: InvalidPaymentError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.post("/api/payments", status_code=201, responses=_UNREADABLE)
    async def create_payment(data: PaymentCreate) -> PaymentRead:
        return _read(await service.create(data.amount, data.currency))

    @app.get("/api/payments/{payment_id}", responses=_UNKNOWN)
    async def get_payment(payment_id: str) -> PaymentRead:
        return _read(_find(service, payment_id))

    @app.get("/api/payments/{payment_id}/events", response_class=StreamingResponse, responses=_EVENTS)
    async def watch_payment(payment_id: str) -> StreamingResponse:
        _find(service, payment_id)
        return StreamingResponse(_events(service, payment_id), media_type="text/event-stream")

    install(app, pipeline, health=checker)
    return app


async def _events(service: PaymentService, payment_id: str) -> AsyncIterator[str]:
    async for payment in service.watch(payment_id):
        yield f"event: {payment.status}\ndata: {json.dumps(asdict(payment))}\n\n"


def _find(service: PaymentService, payment_id: str) -> Payment:
    try:
        return service.get(payment_id)
    except UnknownPaymentError:
        raise HTTPException(404, "No such payment") from None


def _read(payment: Payment) -> PaymentRead:
    return PaymentRead(**asdict(payment))
