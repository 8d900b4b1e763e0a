"""The demo's gRPC door."""

from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import NoReturn, TypeAlias

import grpc
from grpc_reflection.v1alpha import reflection

from examples.payments.service import InvalidPaymentError, PaymentService, UnknownPaymentError
from examples.payments.v1 import payments_pb2 as pb
from examples.payments.v1 import payments_pb2_grpc
from grpc_interceptors import ResilienceInterceptor, add_health
from resilience import ConfigurationError, HealthChecker, Pipeline

SERVICE = pb.DESCRIPTOR.services_by_name["PaymentService"].full_name
Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"


class PaymentServicer(payments_pb2_grpc.PaymentServiceServicer):  # type: ignore[misc] # its base has no types
    """Speaks gRPC for the one service object."""

    def __init__(self, service: PaymentService) -> None:
        self._service = service

    async def CreatePayment(self, request: pb.CreatePaymentRequest, context: Context) -> pb.Payment:
        """Take one payment."""
        return await self._create(request, context)

    async def GetPayment(self, request: pb.GetPaymentRequest, context: Context) -> pb.Payment:
        """Return a payment."""
        try:
            return pb.Payment(**asdict(self._service.get(request.id)))
        except UnknownPaymentError:
            await _not_found(context)

    async def WatchPayment(self, request: pb.WatchPaymentRequest, context: Context) -> AsyncIterator[pb.Payment]:
        """Send a payment at each change."""
        try:
            async for payment in self._service.watch(request.id):
                yield pb.Payment(**asdict(payment))
        except UnknownPaymentError:
            await _not_found(context)

    async def ImportPayments(
        self, request_iterator: AsyncIterator[pb.CreatePaymentRequest], context: Context
    ) -> pb.ImportPaymentsResponse:
        """Take many payments."""
        imported = 0
        async for request in request_iterator:
            await self._create(request, context)
            imported += 1
        return pb.ImportPaymentsResponse(imported=imported)

    async def _create(self, request: pb.CreatePaymentRequest, context: Context) -> pb.Payment:
        try:
            return pb.Payment(**asdict(await self._service.create(request.amount, request.currency)))
        except InvalidPaymentError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))


async def _not_found(context: Context) -> NoReturn:
    await context.abort(grpc.StatusCode.NOT_FOUND, "No such payment")


def build_server(service: PaymentService, pipeline: Pipeline, checker: HealthChecker) -> grpc.aio.Server:
    """Return the guarded server, with health and reflection."""
    # Two processes that listen on one port would each get some of the calls, and neither would say so.
    options = [("grpc.so_reuseport", 0)]
    server = grpc.aio.server(interceptors=[ResilienceInterceptor(pipeline)], options=options)
    payments_pb2_grpc.add_PaymentServiceServicer_to_server(PaymentServicer(service), server)
    add_health(server, checker, [SERVICE])
    reflection.enable_server_reflection([SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME], server)
    return server


def listen(server: grpc.aio.Server, host: str, port: int, name: str) -> int:
    """Have ``server`` listen without encryption; return the port.

    Raises:
        ConfigurationError: the port, which the setting ``name`` chose, can't be had.
    """
    try:
        return server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError:
        raise ConfigurationError(f"{name}: port {port} can't be used; choose another.") from None
