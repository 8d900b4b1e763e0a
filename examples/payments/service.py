"""The business: payments, in memory, without a word of any protocol."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import structlog

from resilience import operation
from resilience.codecs import JsonCodec

CREATE_PAYMENT = "create_payment"

log = structlog.get_logger()


class InvalidPaymentError(Exception):
    """The payment can't be taken; the text says why and goes to the client."""


class UnknownPaymentError(Exception):
    """There is no payment of that id."""


@dataclass(frozen=True, slots=True)
class Payment:
    """One payment. The amount is in the currency's minor unit."""

    id: str
    amount: int
    currency: str
    status: str = "accepted"


class PaymentService:
    """Takes payments.

    Args:
        processing: seconds that taking a payment lasts, and settling it again.
    """

    def __init__(self, processing: float) -> None:
        self._processing = processing
        self._payments: dict[str, Payment] = {}
        self._changed = asyncio.Condition()
        self._settling: set[asyncio.Task[None]] = set()

    @operation(CREATE_PAYMENT, JsonCodec(Payment), errors=(InvalidPaymentError,))
    async def create(self, amount: int, currency: str) -> Payment:
        """Take a payment. The side effect that must not happen twice, whichever door a retry comes through.

        Raises:
            InvalidPaymentError: the amount or the currency is out of range.
        """
        if not 1 <= amount <= 10**12:
            raise InvalidPaymentError("amount must be 1 to 10^12 minor units")
        if not (len(currency) == 3 and currency.isascii() and currency.isupper()):
            raise InvalidPaymentError("currency must be three capitals, as in ISO 4217")
        log.info("payment started", amount=amount, currency=currency)
        await asyncio.sleep(self._processing)
        payment = Payment(f"pay_{secrets.token_hex(8)}", amount, currency)
        self._payments[payment.id] = payment
        log.info("payment created", payment=payment.id, amount=amount, currency=currency)
        task = asyncio.create_task(self._settle(payment))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return payment

    def get(self, payment_id: str) -> Payment:
        """Return a payment.

        Raises:
            UnknownPaymentError: there is none.
        """
        try:
            return self._payments[payment_id]
        except KeyError:
            raise UnknownPaymentError from None

    async def watch(self, payment_id: str) -> AsyncIterator[Payment]:
        """Yield a payment now and at each change, until it is settled.

        Raises:
            UnknownPaymentError: there is none.
        """
        yield (seen := self.get(payment_id))
        while seen.status != "settled":
            async with self._changed:
                while self._payments[payment_id] == seen:
                    await self._changed.wait()
            yield (seen := self._payments[payment_id])

    async def _settle(self, payment: Payment) -> None:
        await asyncio.sleep(self._processing)
        async with self._changed:
            self._payments[payment.id] = replace(payment, status="settled")
            self._changed.notify_all()
