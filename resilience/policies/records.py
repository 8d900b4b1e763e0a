"""Floor 2: what an operator may do with idempotency records: look, let a key be used anew, answer for a lost worker."""

from resilience.decisions.idempotency import accept_key, record_key
from resilience.decisions.idempotency_record import Standing
from resilience.errors import ConfigurationError
from resilience.stores.base import IdempotencyStore
from resilience.verdict import Reply


class IdempotencyRecords:
    """The records of a store, found as the doors find them: by operation, caller and key.

    An operation is called as its policy's ``operation=`` says, else as its door does: ``"POST /orders/{id}"``,
    ``"/pkg.Service/Method"``. A caller is what ``admission.caller()`` says; ``caller.by_user`` names a user.

    Args:
        store: the one that the policies use.
    """

    def __init__(self, store: IdempotencyStore) -> None:
        self._store = store

    async def inspect(self, operation: str, caller: str, key: str) -> Standing | None:
        """Return what is known of an operation, or None where nothing is.

        Raises:
            ConfigurationError: the key is malformed.
            StoreUnavailableError: the store did not answer.
        """
        return await self._store.inspect(_name(operation, caller, key))

    async def forget(self, operation: str, caller: str, key: str) -> bool:
        """Let the key be used as if it were new; False where there is nothing, or a live worker runs it.

        Raises:
            ConfigurationError: the key is malformed.
            StoreUnavailableError: the store did not answer.
        """
        return await self._store.forget(_name(operation, caller, key))

    async def resolve(
        self, operation: str, caller: str, key: str, reply: Reply | None, *, ttl: float = 86_400.0
    ) -> bool:
        """Answer for an operation whose worker vanished: retries get ``reply`` from now on.

        The worker, should it come back, can't change that any more.

        Args:
            reply: as its door would have stored it; None tells retries that it is done, and no more.
            ttl: seconds that the answer is kept.

        Returns:
            False where there is no such operation, its worker is alive, or it is done with another answer.

        Raises:
            ConfigurationError: the key is malformed.
            StoreUnavailableError: the store did not answer.
        """
        return await self._store.resolve(_name(operation, caller, key), reply, ttl=ttl)


def _name(operation: str, caller: str, key: str) -> str:
    accepted = accept_key([key])
    if accepted is None:
        raise ConfigurationError("A key is 1 to 255 visible ASCII characters, without quotes or backslashes inside.")
    return record_key("", operation, caller, accepted)
