"""What is kept of replies is smaller where that pays, secret where that is asked for, and never taken for another."""

import logging
import os
import struct
import sys
import tracemalloc
import zlib
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from resilience.errors import ConfigurationError
from resilience.settings import Settings
from resilience.stores.memory import MemoryStore
from resilience.stores.sealing import LARGEST, WORTH, Sealing, keys_from_text

OLD, NEW = bytes(range(32)), bytes(range(1, 33))
NAME, OTHER_NAME = "resilience:v1:{aa}:I", "resilience:v1:{ab}:I"
PLAIN = b'[2,"http",200,[],4,null]\nbody'
LONG = b'[2,"http",200,[],4000,null]\n' + b"0123456789" * 400
PRINT, OTHER_PRINT = b"http:" + b"1" * 32, b"http:" + b"2" * 32

envelopes = st.binary(min_size=1, max_size=300).map(lambda tail: b"[" + tail)
sized = st.builds(lambda unit, times: b"[" + unit * times, st.binary(min_size=1, max_size=40), st.integers(1, 200))


def deflated(content: bytes, length: int) -> bytes:
    return struct.pack(">BBI", 3, 1, length) + zlib.compress(content)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.DEBUG, "resilience")
    return lambda: [each.getMessage() for each in caplog.records]


# --- round trips


@settings(deadline=None)
@given(envelopes | sized, st.booleans(), st.sampled_from([None, {"a": OLD}, {"b": NEW, "a": OLD}]))
def test_what_is_sealed_is_opened_as_it_was(envelope: bytes, compress: bool, keys: dict[str, bytes] | None) -> None:
    sealing = Sealing(compress=compress, keys=keys)
    assert sealing.open(sealing.seal(envelope, NAME), NAME) == envelope


@pytest.mark.parametrize("size", [2**14, 2**14 + 1, 2**20, LARGEST + 1], ids=str)
def test_a_large_reply_is_opened_as_it_was(size: int) -> None:
    sealing, envelope = Sealing(compress=True, keys={"a": OLD}), b"[" + bytes(size)
    kept = sealing.seal(envelope, NAME)
    assert sealing.open(kept, NAME) == envelope
    assert (len(kept) < size // 100) is (size <= LARGEST)


def test_without_options_an_envelope_is_kept_as_it_is() -> None:
    assert Sealing().seal(LONG, NAME) == LONG


# --- compression


def test_what_is_no_larger_than_a_kibibyte_is_not_compressed() -> None:
    sealing = Sealing(compress=True)
    assert sealing.seal(b"[" * WORTH, NAME) == b"[" * WORTH
    assert len(sealing.seal(b"[" * (WORTH + 1), NAME)) < 100


@pytest.mark.parametrize("size", [2000, 100_000])
def test_what_would_not_be_smaller_is_kept_as_it_is(size: int) -> None:
    envelope = b"[" + os.urandom(size)
    assert Sealing(compress=True).seal(envelope, NAME) == envelope
    assert len(Sealing(compress=True, keys={"a": OLD}).seal(envelope, NAME)) < len(envelope) + 50


def test_who_does_not_compress_still_reads_what_is_compressed() -> None:
    kept = Sealing(compress=True).seal(LONG, NAME)
    assert len(kept) < len(LONG) // 4
    assert Sealing().open(kept, NAME) == LONG
    assert Sealing(keys={"a": OLD}).open(kept, NAME) == LONG


@pytest.mark.parametrize("bit", range(8))
def test_a_compressed_reply_with_a_flipped_bit_is_never_another_reply(bit: int) -> None:
    kept = Sealing(compress=True).seal(LONG, NAME)
    for at in range(len(kept)):
        flipped = kept[:at] + bytes([kept[at] ^ 1 << bit]) + kept[at + 1 :]
        # One whose first byte is another is for the reader of envelopes to refuse.
        assert Sealing().open(flipped, NAME) in ((None, LONG) if at else (flipped,))


def test_a_compressed_reply_that_was_cut_or_lengthened_is_not_opened() -> None:
    kept = Sealing(compress=True).seal(LONG, NAME)
    assert not [cut for cut in range(1, len(kept)) if Sealing().open(kept[:cut], NAME) is not None]
    assert Sealing().open(kept + b"\0", NAME) is None


@pytest.mark.parametrize("length", [0, 1, 1000, LARGEST - 1, LARGEST + 1, 2**32 - 1])
def test_what_inflates_to_more_or_less_than_it_says_is_not_opened(length: int) -> None:
    assert Sealing().open(deflated(bytes(LARGEST), length), NAME) is None


@pytest.mark.parametrize("flags", [4, 5, 8, 128])
def test_a_reply_that_a_later_version_kept_otherwise_is_not_opened(flags: int) -> None:
    kept = PLAIN if flags != 5 else zlib.compress(PLAIN)
    assert Sealing().open(struct.pack(">BBI", 3, flags, len(PLAIN)) + kept, NAME) is None


def test_more_than_the_largest_is_not_inflated() -> None:
    assert Sealing().open(deflated(bytes(LARGEST), LARGEST), NAME) == bytes(LARGEST)
    assert Sealing().open(deflated(bytes(LARGEST + 1), LARGEST + 1), NAME) is None


def test_a_large_reply_that_ends_in_packed_bytes_is_not_packed_again() -> None:
    envelope = b"[" + bytes(100_000) + os.urandom(5000)
    assert Sealing(compress=True).seal(envelope, NAME) == envelope


def test_a_bomb_is_not_inflated_beyond_what_it_says() -> None:
    sealing = Sealing()
    bomb = deflated(bytes(LARGEST), 1000)
    tracemalloc.start()
    try:
        assert sealing.open(bomb, NAME) is None
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# --- encryption


def test_nothing_of_a_sealed_reply_is_readable() -> None:
    kept = Sealing(keys={"a": OLD}).seal(PLAIN, NAME)
    assert b"body" not in kept
    assert b"http" not in kept


def test_no_two_seals_are_alike() -> None:
    sealing = Sealing(keys={"a": OLD})
    assert len({sealing.seal(PLAIN, NAME) for _ in range(100)}) == 100


@pytest.mark.parametrize("envelope", [PLAIN, LONG], ids=["short", "compressed"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_sealed_reply_with_a_flipped_bit_is_not_opened(envelope: bytes, strict: bool) -> None:
    sealing = Sealing(compress=True, keys={"a": OLD, "c": NEW}, refuse_unsealed=strict)
    kept = sealing.seal(envelope, NAME)
    for at in range(len(kept)):
        for bit in range(8):
            flipped = kept[:at] + bytes([kept[at] ^ 1 << bit]) + kept[at + 1 :]
            # Without its mark it is an envelope of nobody's version.
            assert sealing.open(flipped, NAME) == (None if at or strict else flipped)


def test_a_sealed_reply_that_was_cut_or_lengthened_is_not_opened() -> None:
    sealing = Sealing(keys={"a": OLD})
    kept = sealing.seal(PLAIN, NAME)
    assert not [cut for cut in range(1, len(kept)) if sealing.open(kept[:cut], NAME) is not None]
    assert sealing.open(kept + b"\0", NAME) is None


def test_a_reply_that_was_moved_to_another_record_is_not_opened() -> None:
    sealing = Sealing(keys={"a": OLD})
    kept = sealing.seal(PLAIN, NAME)
    assert sealing.open(kept, OTHER_NAME) is None
    assert sealing.open(kept, NAME) == PLAIN


@pytest.mark.parametrize("keys", [None, {"b": OLD}, {"a": NEW}, {"A": OLD}], ids=["none", "id", "secret", "case"])
def test_without_its_key_a_reply_is_not_opened(keys: dict[str, bytes] | None) -> None:
    assert Sealing(keys=keys).open(Sealing(keys={"a": OLD}).seal(PLAIN, NAME), NAME) is None


def test_keys_change_without_a_reply_that_some_process_can_not_open() -> None:
    steps = [{"old": OLD}, {"old": OLD, "new": NEW}, {"new": NEW, "old": OLD}, {"new": NEW}]
    for before, after in pairwise(steps[:3]):
        one, two = Sealing(keys=before), Sealing(keys=after)
        assert two.open(one.seal(PLAIN, NAME), NAME) == PLAIN
        assert one.open(two.seal(PLAIN, NAME), NAME) == PLAIN
    last = Sealing(keys=steps[3])
    assert last.open(Sealing(keys=steps[2]).seal(PLAIN, NAME), NAME) == PLAIN
    assert last.open(Sealing(keys=steps[0]).seal(PLAIN, NAME), NAME) is None


def test_replies_from_before_encryption_are_read_until_they_are_refused() -> None:
    assert Sealing(keys={"a": OLD}).open(PLAIN, NAME) == PLAIN
    strict = Sealing(keys={"a": OLD}, refuse_unsealed=True)
    assert strict.open(PLAIN, NAME) is None
    assert strict.open(Sealing(compress=True).seal(LONG, NAME), NAME) is None
    assert strict.open(strict.seal(PLAIN, NAME), NAME) == PLAIN


@pytest.mark.parametrize("kept", [b"\3", b"\3\2", b"\3\4" + bytes(8), b"\3\2" + bytes(4), b"\3\2" + bytes(4) + b"\xff"])
def test_a_malformed_seal_is_not_opened(kept: bytes) -> None:
    assert Sealing(keys={"a": OLD}).open(kept, NAME) is None


@given(st.binary(max_size=60))
def test_foreign_bytes_behind_our_mark_are_not_opened(tail: bytes) -> None:
    assert Sealing(compress=True, keys={"a": OLD}).open(b"\3\2" + tail, NAME) is None


# --- what is told


def test_each_kind_of_fault_is_told_once_and_without_content(told: Callable[[], list[str]]) -> None:
    sealing = Sealing(keys={"a": OLD})
    foreign = Sealing(keys={"secret-id": NEW}).seal(PLAIN, NAME)
    broken = sealing.seal(PLAIN, OTHER_NAME)
    for _ in range(3):
        for kept in (foreign, broken, deflated(LONG, 5)):
            assert sealing.open(kept, NAME) is None
    assert len(told()) == 3
    assert "key that this process was not given" in told()[0]
    assert "seal is broken" in told()[1]
    assert "damaged" in told()[2]
    for hidden in ("secret-id", "body", NAME, OTHER_NAME, repr(OLD), OLD.hex()):
        assert not [line for line in told() if hidden in line]


def test_what_was_opened_is_not_told(told: Callable[[], list[str]]) -> None:
    sealing = Sealing(compress=True, keys={"a": OLD})
    sealing.open(sealing.seal(LONG, NAME), NAME)
    sealing.open(PLAIN, NAME)
    assert told() == []


def test_no_key_is_shown() -> None:
    sealing = Sealing(keys={"a": b"hunter2-" * 4})
    assert "hunter2" not in repr(sealing) + repr(vars(sealing))


# --- fingerprints


def test_without_keys_a_fingerprint_is_kept_as_it_is() -> None:
    assert Sealing().fingerprint(PRINT) == PRINT
    assert Sealing().fingerprint_like(b"http/a:" + bytes(32), PRINT) == PRINT


def test_with_keys_a_fingerprint_can_not_be_had_from_a_guess() -> None:
    kept = Sealing(keys={"a": OLD}).fingerprint(PRINT)
    assert kept.startswith(b"http/a:")
    assert len(kept) == len(b"http/a:") + 32
    assert PRINT[5:] not in kept
    assert kept != Sealing(keys={"a": NEW}).fingerprint(PRINT)


def test_fingerprints_are_equal_in_every_process_and_while_keys_change() -> None:
    one, two = Sealing(keys={"old": OLD}), Sealing(keys={"new": NEW, "old": OLD})
    assert one.fingerprint(PRINT) == Sealing(keys={"old": OLD}).fingerprint(PRINT)
    assert two.fingerprint_like(one.fingerprint(PRINT), PRINT) == one.fingerprint(PRINT)
    assert two.fingerprint_like(one.fingerprint(PRINT), OTHER_PRINT) != one.fingerprint(PRINT)
    assert two.fingerprint_like(PRINT, PRINT) == PRINT


def test_a_fingerprint_without_a_door_is_kept_as_it_is() -> None:
    assert Sealing(keys={"a": OLD}).fingerprint(b"1" * 32) == b"1" * 32


def test_a_token_that_follows_from_a_reply_does_not_tell_it() -> None:
    assert Sealing().token("resolved") == "resolved"
    one = Sealing(keys={"a": OLD}).token("resolved")
    assert one == Sealing(keys={"a": OLD}).token("resolved")
    assert one not in ("resolved", Sealing(keys={"a": NEW}).token("resolved"))


# --- configuration


@pytest.mark.parametrize(
    "keys",
    [
        *({}, {"": OLD}, {"a b": OLD}, {"a:b": OLD}, {"a/b": OLD}, {"a" * 65: OLD}, {"é": OLD}),
        *({"a": OLD[1:]}, {"a": OLD + b"2"}, {"a": b""}, {"a": "hunter2-" * 4}),
    ],
)
def test_malformed_keys_are_refused_and_not_shown(keys: dict[str, bytes]) -> None:
    with pytest.raises(ConfigurationError) as wrong:
        Sealing(keys=keys)
    assert "hunter2" not in str(wrong.value)
    assert repr(OLD)[2:-1] not in str(wrong.value)


def test_refusing_what_is_not_sealed_needs_keys() -> None:
    with pytest.raises(ConfigurationError, match="refuse_unsealed"):
        Sealing(refuse_unsealed=True)


def test_who_encrypts_without_the_package_is_told_which_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(ConfigurationError, match=r"grpc-http-resilience\[encryption\]"):
        Sealing(keys={"a": OLD})
    assert Sealing(compress=True).open(PLAIN, NAME) == PLAIN


def text(key_id: str, secret: bytes) -> str:
    return f"{key_id}:{b64encode(secret).decode()}"


def test_keys_are_read_in_their_order() -> None:
    read = keys_from_text(f" {text('new', NEW)} , {text('old', OLD)}")
    assert list(read.items()) == [("new", NEW), ("old", OLD)]
    odd = b"\xfb\xff" * 16
    assert keys_from_text(f"a:{urlsafe_b64encode(odd).decode()}") == {"a": odd} == keys_from_text(text("a", odd))


WRONG = ["", " ", ",", "hunter2", "a:", "a:hunter2", "a:hunter2hunter2hunter2hunter2hunter2", "a:é"]
WRONG += [
    ":" + b64encode(OLD).decode(),
    text("a", OLD) + ",",
    text("a", OLD)[:-1],
    text("a", OLD) + "=",
    text("a b", OLD),
]
WRONG += [text("a", OLD) + "," + text("a", NEW), text("a", OLD + NEW)]


@pytest.mark.parametrize("value", WRONG)
def test_a_malformed_variable_is_named_and_its_value_is_not_shown(
    value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IDEMPOTENCY_ENCRYPTION_KEYS", value)
    with pytest.raises(ConfigurationError) as wrong:
        Settings.load()
    assert "IDEMPOTENCY_ENCRYPTION_KEYS" in str(wrong.value)
    with pytest.raises(ValidationError) as raw:
        Settings()
    for shown in (str(wrong.value), str(raw.value)):
        assert "hunter2" not in shown
        assert b64encode(OLD).decode()[:20] not in shown


def test_good_keys_are_hidden_in_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IDEMPOTENCY_ENCRYPTION_KEYS", text("new", NEW))
    settings = Settings.load()
    assert b64encode(NEW).decode() not in repr(settings)
    monkeypatch.delenv("REDIS_URL", raising=False)
    assert isinstance(Settings.load().store(), MemoryStore)
