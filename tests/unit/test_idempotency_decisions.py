import pytest

from resilience.decisions.idempotency import (
    LONGEST_HINT,
    Abandoned,
    Claimed,
    Completed,
    InProgress,
    Mismatched,
    Record,
    Step,
    Takeover,
    accept_key,
    claimed,
    decide_claim,
    differs,
    may,
    record_key,
)
from resilience.verdict import Reply

PRINT, OTHER_PRINT, FOREIGN_PRINT = b"http:1", b"http:2", b"grpc:3"
REPLY = Reply("http", 201, (("a", "b"),), b"{}")
TAKEOVERS: tuple[Takeover, ...] = ("reexecute", "refuse")


def running(lease_until: float = 30.0, epoch: int = 1) -> Record:
    return Record("owner", epoch, PRINT, lease_until)


def done(reply: Reply | None = REPLY) -> Record:
    return Record("owner", 1, PRINT, 30.0, done=True, reply=reply)


@pytest.mark.parametrize(
    "key", ["k", "a" * 255, "8e03978e-40d5-43dd-bc93-6894a57f9324", "!#$%&'()*+,-./:;<=>?@[]^_`{|}~"]
)
def test_a_key_is_accepted_bare_and_quoted_and_means_the_same(key: str) -> None:
    assert accept_key([key]) == key
    assert accept_key([f'"{key}"']) == key


@pytest.mark.parametrize(
    "value",
    [
        "",
        '""',
        "a" * 256,
        "a" * 300,
        '"' + "a" * 256 + '"',
        "a b",
        "a\n",
        "\x00",
        "a\x7f",
        "é",
        'a"b',
        "a\\b",
        '"a',
        'a"',
    ],
)
def test_a_malformed_key_is_refused(value: str) -> None:
    assert accept_key([value]) is None


@pytest.mark.parametrize("values", [[], ["a", "a"], ["a", "b"]])
def test_a_key_is_sent_once(values: list[str]) -> None:
    assert accept_key(values) is None


def test_a_record_key_is_64_hex_digits_whatever_its_parts_hold() -> None:
    for part in ("", "a", "\ud800", "x" * 10_000):
        key = record_key(part, part, part, part)
        assert len(key) == 64
        assert set(key) <= set("0123456789abcdef")


def test_no_two_record_keys_are_equal_unless_every_part_is() -> None:
    parts = [
        ("n", "o", "c", "k"),
        ("no", "", "c", "k"),
        ("", "no", "c", "k"),
        ("n", "oc", "", "k"),
        ("n", "o", "ck", ""),
    ]
    parts += [("n", "o", "c", "K"), ("n", "o", "C", "k"), ("n", "O", "c", "k"), ("N", "o", "c", "k")]
    assert len({record_key(*part) for part in parts}) == len(parts)
    assert record_key("n", "o", "c", "k") == record_key("n", "o", "c", "k")


@pytest.mark.parametrize("takeover", TAKEOVERS)
def test_a_free_key_is_granted_as_the_first(takeover: Takeover) -> None:
    assert decide_claim(None, "new", PRINT, takeover, 30.0, 0.0) == Claimed(1)


@pytest.mark.parametrize("takeover", TAKEOVERS)
@pytest.mark.parametrize("token", ["owner", "new"])
@pytest.mark.parametrize("record", [running(), running(lease_until=-1.0), done()])
def test_a_mismatch_is_told_before_everything_else(record: Record, token: str, takeover: Takeover) -> None:
    assert decide_claim(record, token, OTHER_PRINT, takeover, 30.0, 0.0) == Mismatched()


@pytest.mark.parametrize("token", ["owner", "new"])
@pytest.mark.parametrize("reply", [REPLY, None])
def test_a_finished_key_answers_what_was_kept(reply: Reply | None, token: str) -> None:
    assert decide_claim(done(reply), token, PRINT, "refuse", 30.0, 99.0) == Completed(reply)


@pytest.mark.parametrize("now", [0.0, 30.0, 99.0])
def test_the_owner_is_granted_again_with_its_epoch(now: float) -> None:
    assert decide_claim(running(epoch=3), "owner", PRINT, "refuse", 30.0, now) == Claimed(3)


def test_a_twin_is_asked_to_wait_for_the_rest_of_the_lease() -> None:
    assert decide_claim(running(), "twin", PRINT, "reexecute", 30.0, 28.0) == InProgress(2.0)


def test_a_twin_is_never_asked_to_wait_long() -> None:
    assert decide_claim(running(), "twin", PRINT, "reexecute", 30.0, 0.0) == InProgress(LONGEST_HINT)
    assert decide_claim(running(), "twin", PRINT, "reexecute", 1.0, 0.0) == InProgress(1.0)


def test_a_lease_ends_at_its_instant() -> None:
    assert isinstance(decide_claim(running(), "twin", PRINT, "reexecute", 30.0, 29.999), InProgress)
    assert decide_claim(running(epoch=4), "twin", PRINT, "reexecute", 30.0, 30.0) == Claimed(5)
    assert decide_claim(running(epoch=4), "twin", PRINT, "refuse", 30.0, 30.0) == Abandoned()


def test_another_doors_payload_is_no_mismatch() -> None:
    assert isinstance(decide_claim(running(), "twin", FOREIGN_PRINT, "reexecute", 30.0, 0.0), InProgress)
    assert decide_claim(done(), "twin", FOREIGN_PRINT, "reexecute", 30.0, 0.0) == Completed(REPLY)


def test_a_granted_claim_is_a_running_record_with_a_lease() -> None:
    assert claimed("owner", 2, PRINT, 30.0, 5.0) == Record("owner", 2, PRINT, 35.0, done=False, reply=None)


@pytest.mark.parametrize(
    ("step", "record", "token", "allowed"),
    [
        ("complete", None, "owner", True),
        ("renew", None, "owner", False),
        ("release", None, "owner", False),
        ("complete", running(), "owner", True),
        ("renew", running(), "owner", True),
        ("release", running(), "owner", True),
        ("complete", done(), "owner", True),
        ("renew", done(), "owner", False),
        ("release", done(), "owner", False),
        ("complete", running(), "stale", False),
        ("renew", running(), "stale", False),
        ("release", running(), "stale", False),
        ("complete", done(), "stale", False),
        ("renew", done(), "stale", False),
        ("release", done(), "stale", False),
    ],
)
def test_only_the_owner_may_change_a_record(step: Step, record: Record | None, token: str, allowed: bool) -> None:
    assert may(step, record, token) is allowed


def test_fingerprints_differ_within_one_door_only() -> None:
    assert differs(PRINT, OTHER_PRINT)
    assert not differs(PRINT, PRINT)
    assert not differs(PRINT, FOREIGN_PRINT)
