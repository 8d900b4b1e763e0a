"""A small gRPC client for the demo: prints the reply, the status and what came beside it."""

import argparse
import asyncio
import sys

import grpc
from google.protobuf.json_format import MessageToJson
from grpc_health.v1 import health_pb2, health_pb2_grpc

from examples.payments.v1 import payments_pb2 as pb
from examples.payments.v1 import payments_pb2_grpc


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="payments client", description=__doc__)
    parser.add_argument("--target", default="127.0.0.1:50051", help="host:port of the gRPC door")
    parser.add_argument("--api-key", help="whom to call as")
    verbs = parser.add_subparsers(dest="verb", required=True)
    create = verbs.add_parser("create", help="take a payment")
    create.add_argument("--amount", type=int, required=True, help="in the currency's minor unit")
    create.add_argument("--currency", required=True, help="three capitals")
    create.add_argument("--key", help="the idempotency key")
    for verb, help_ in (("get", "show a payment"), ("watch", "follow a payment until it is settled")):
        verbs.add_parser(verb, help=help_).add_argument("id")
    verbs.add_parser("health", help="ask whether the service should get work")
    return parser.parse_args()


async def _call(arguments: argparse.Namespace) -> int:
    metadata = [("x-api-key", arguments.api_key)] if arguments.api_key else []
    async with grpc.aio.insecure_channel(arguments.target) as channel:
        payments = payments_pb2_grpc.PaymentServiceStub(channel)
        if arguments.verb == "create":
            if arguments.key:
                metadata.append(("idempotency-key", arguments.key))
            request = pb.CreatePaymentRequest(amount=arguments.amount, currency=arguments.currency)
            call = payments.CreatePayment(request, metadata=metadata)
        elif arguments.verb == "get":
            call = payments.GetPayment(pb.GetPaymentRequest(id=arguments.id), metadata=metadata)
        elif arguments.verb == "watch":
            call = payments.WatchPayment(pb.WatchPaymentRequest(id=arguments.id), metadata=metadata)
        else:
            call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        try:
            if arguments.verb == "watch":
                async for reply in call:
                    print(MessageToJson(reply, indent=None))
            else:
                print(MessageToJson(await call, indent=None))
        except grpc.aio.AioRpcError:
            pass  # the status below says it
        status = await call.code()
        print(f"{status.name} {await call.details()}".rstrip())
        for name, value in await call.trailing_metadata() or ():
            print(f"  {name}: {value!r}" if isinstance(value, bytes) else f"  {name}: {value}")
        return 0 if status is grpc.StatusCode.OK else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(_call(_arguments())))
