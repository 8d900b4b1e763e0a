from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from resilience.decisions.idempotency import Abandoned, Claimed, Completed, InProgress, Mismatched, Takeover
from resilience.stores.memory import MemoryStore
from resilience.testing import ManualClock
from resilience.verdict import Reply

T = TypeVar("T")
KEYS = ("k1", "k2")
PRINTS = (b"http:1", b"http:1", b"http:2", b"grpc:1")
LEASE, TTL = 2.0, 10.0
TAKEOVERS: tuple[Takeover, ...] = ("reexecute", "refuse")


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    raise AssertionError("A memory store never pauses")


@dataclass(frozen=True)
class Attempt:
    """One attempt of one call: what it would send, and what it would answer."""

    key: str
    token: str
    print: bytes
    reply: Reply | None


@dataclass
class Life:
    """What has happened to a key since it was last as good as new."""

    owner: Attempt
    alive_until: float
    kept_until: float
    epoch: int = 1
    answered: bool = False
    given_back: bool = False
    """By an owner that had taken over: only the epoch is remembered."""

    def is_owned_by(self, attempt: Attempt) -> bool:
        return self.owner.token == attempt.token and not self.given_back


class IdempotencyMachine(RuleBasedStateMachine):
    attempts: Bundle[Attempt] = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.store = MemoryStore(clock=self.clock)
        self.lives: dict[str, Life] = {}
        self.count = 0

    def life(self, key: str) -> Life | None:
        life = self.lives.get(key)
        if life is not None and life.kept_until <= self.clock():
            del self.lives[key]
            return None
        return life

    def attempt(self, key: str, print_: bytes) -> Attempt:
        self.count += 1
        token = f"token-{self.count}"
        reply = Reply("http", 200, (), token.encode()) if self.count % 4 else None
        return Attempt(key, token, print_, reply)

    def claim(self, attempt: Attempt, takeover: Takeover) -> object:
        return at_once(
            self.store.claim(attempt.key, attempt.token, attempt.print, lease=LEASE, ttl=TTL, takeover=takeover)
        )

    @initialize(target=attempts)
    def the_first(self) -> Attempt:
        return self.attempt("k1", b"http:1")

    @rule(target=attempts, key=st.sampled_from(KEYS), print_=st.sampled_from(PRINTS))
    def somebody_comes(self, key: str, print_: bytes) -> Attempt:
        return self.attempt(key, print_)

    @rule(seconds=st.sampled_from([0.0, 0.5, LEASE - 0.5, LEASE, LEASE + 0.5, TTL - LEASE, TTL]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(attempt=attempts, takeover=st.sampled_from(TAKEOVERS))
    def claims(self, attempt: Attempt, takeover: Takeover) -> None:
        now, life = self.clock(), self.life(attempt.key)
        answer = self.claim(attempt, takeover)
        if life is None:
            assert answer == Claimed(1)
            self.lives[attempt.key] = Life(attempt, now + LEASE, now + TTL)
            return
        owner = life.owner
        if life.given_back:
            assert answer == Claimed(life.epoch + 1)
            self.lives[attempt.key] = Life(attempt, now + LEASE, now + TTL, life.epoch + 1)
            return
        same_door = owner.print[:5] == attempt.print[:5]
        if same_door and owner.print != attempt.print:
            assert answer == Mismatched()
        elif life.answered:
            assert answer == Completed(owner.reply)
        elif owner.token == attempt.token:
            assert answer == Claimed(life.epoch)
            life.alive_until, life.kept_until = now + LEASE, now + TTL
        elif now < life.alive_until:
            assert isinstance(answer, InProgress)
            assert 0 < answer.retry_after <= life.alive_until - now
        elif takeover == "refuse":
            assert answer == Abandoned()
        else:
            assert answer == Claimed(life.epoch + 1)
            self.lives[attempt.key] = Life(attempt, now + LEASE, now + TTL, life.epoch + 1)

    @rule(attempt=attempts)
    def renews(self, attempt: Attempt) -> None:
        now, life = self.clock(), self.life(attempt.key)
        renewed = at_once(self.store.renew(attempt.key, attempt.token, lease=LEASE, ttl=TTL))
        owns = life is not None and life.is_owned_by(attempt) and not life.answered
        assert renewed == owns
        if life is not None and owns:
            life.alive_until, life.kept_until = now + LEASE, now + TTL

    @rule(attempt=attempts)
    def completes(self, attempt: Attempt) -> None:
        now, life = self.clock(), self.life(attempt.key)
        stored = at_once(self.store.complete(attempt.key, attempt.token, attempt.print, attempt.reply, ttl=TTL))
        if life is None:
            assert stored  # better a late record than a second run
            self.lives[attempt.key] = Life(attempt, now, now + TTL, answered=True)
            return
        may = life.given_back or life.is_owned_by(attempt)
        assert stored == may
        if may:
            self.lives[attempt.key] = Life(attempt, now, now + TTL, life.epoch, answered=True)

    @rule(attempt=attempts)
    def releases(self, attempt: Attempt) -> None:
        now, life = self.clock(), self.life(attempt.key)
        freed = at_once(self.store.release(attempt.key, attempt.token))
        owns = life is not None and life.is_owned_by(attempt) and not life.answered
        assert freed == owns
        if life is None or not owns:
            return
        if life.epoch == 1:
            del self.lives[attempt.key]
        else:  # whoever was given up may still be at work: no epoch comes again
            life.given_back, life.kept_until = True, now + TTL

    @invariant()
    def at_most_one_owner_is_alive_and_an_answer_stays(self) -> None:
        for key in KEYS:
            life = self.life(key)
            if life is None or life.given_back:
                continue
            owner = life.owner
            stranger = Attempt(key, "stranger", owner.print, None)
            answer = self.claim(stranger, "refuse")  # it can't be granted, hence changes nothing
            if life.answered:
                assert answer == Completed(owner.reply)
            elif self.clock() < life.alive_until:
                assert isinstance(answer, InProgress)
            else:
                assert answer == Abandoned()


TestIdempotencyMachine = IdempotencyMachine.TestCase
TestIdempotencyMachine.settings = settings(deadline=None, max_examples=200, stateful_step_count=40)
