"""Floor 4: idempotency keys alone, for ``app.add_middleware``, configured by the environment."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from http_middleware.configured import ConfiguredMiddleware
from resilience.admission import Admission, Policy
from resilience.call import Call
from resilience.policies.idempotency import IdempotencyPolicy
from resilience.policies.waiting import OnTwin
from resilience.settings import Settings
from resilience.stores.base import Store
from resilience.verdict import PROCEED, Verdict

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster


class IdempotencyMiddleware(ConfiguredMiddleware):
    """Runs every request that carries an ``Idempotency-Key`` once, and answers its retries with the first's reply.

    ``app.add_middleware(IdempotencyMiddleware, redis_client=redis)``. Methods without side effects (GET, HEAD, OPTIONS,
    TRACE) and WebSockets pass. Reads ``IDEMPOTENCY_TTL`` and ``IDEMPOTENCY_LEASE``, both in seconds. Needs the extra
    ``settings``. Wherever it is added, a key is its caller's own, as the application's authentication found the caller.

    Args:
        app: the application inside.
        redis_client: the application's own ``redis.asyncio`` client, which stays the application's to close. Without
            one, ``REDIS_URL`` says where replies are kept, or they are kept in memory.
        required: refuse requests without a key.
        in_progress: ``wait`` keeps a request whose twin runs until the twin's reply is there, for at most ``max_wait``
            seconds and no longer than its ``x-request-timeout-ms`` says; by default it is answered 409 at once.
        settings: in place of the environment.

    Raises:
        ConfigurationError: a variable is wrong; the message names it.
    """

    def __init__(
        self,
        app: ASGIApp,
        redis_client: "Redis | RedisCluster | None" = None,
        *,
        required: bool = False,
        in_progress: OnTwin | None = None,
        max_wait: float = 30.0,
        settings: Settings | None = None,
    ) -> None:
        def policies(store: Store, settings: Settings) -> Sequence[Policy]:
            policy = IdempotencyPolicy(
                store,
                required=required,
                ttl=settings.idempotency_ttl,
                lease=settings.idempotency_lease,
                in_progress=in_progress,
                max_wait=max_wait,
            )
            return [_Requests(policy)]

        super().__init__(app, redis_client, settings, policies)


class _Requests:
    """A policy for requests only: a handshake has no key to bring, and no reply to keep."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    async def admit(self, call: Call, admission: Admission) -> Verdict:
        return PROCEED if call.streaming else await self.policy.admit(call, admission)
