import json
import struct
from dataclasses import replace
from functools import partial
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.call import Protocol
from resilience.stores.record import Stored, pack, unpack
from resilience.stores.sealing import Sealing
from resilience.verdict import Reply

TOKEN, PRINT = bytes(range(16)), b"http:" + b"\xff" * 32
HEAD = 43  # What the scripts count on: the fingerprint's length is its last byte.
REPLY = Reply("http", 201, (("link", "a"), ("link", "b")), b'{"id":1}')

texts = st.text(max_size=10) | st.sampled_from(["", "\n", '"', "\\", "\0", "é", "\ud800"])
replies = st.builds(
    Reply,
    st.sampled_from(["http", "grpc"]),
    st.integers(0, 599),
    st.lists(st.tuples(texts, texts), max_size=4).map(tuple),
    st.binary(max_size=100) | st.sampled_from([b"\n", b"\n\n", b"[1]\n", bytes(range(256))]),
)


def packed(reply: Reply | None = REPLY, *, done: bool = True) -> bytes:
    return pack(done=done, lease=1.5, ttl=60, tombstone=30 if done else 0, token=TOKEN, fingerprint=PRINT, reply=reply)


def with_envelope(envelope: bytes) -> bytes:
    return packed(None) + envelope


def stored(reply: Reply | None = None) -> Stored:
    return Stored(True, 1, 60.0, 90.0, TOKEN, PRINT, reply)


millis = st.integers(1, 4_000_000_000).map(lambda ms: ms / 1000)


@settings(deadline=None)
@given(
    replies | st.none(), st.binary(min_size=16, max_size=16), st.binary(min_size=1, max_size=255), millis, millis
)  # fmt: skip
def test_every_done_record_is_read_as_it_was_written(
    reply: Reply | None, token: bytes, fingerprint: bytes, ttl: float, tombstone: float
) -> None:
    raw = pack(done=True, ttl=ttl, tombstone=tombstone, token=token, fingerprint=fingerprint, reply=reply)
    life = round((ttl + tombstone) * 1000) / 1000
    assert unpack(raw) == Stored(True, 1, ttl, life, token, fingerprint, reply)


@settings(deadline=None)
@given(st.binary(min_size=16, max_size=16), st.binary(min_size=1, max_size=255), millis, millis)
def test_every_running_record_is_read_as_it_was_written(
    token: bytes, fingerprint: bytes, lease: float, ttl: float
) -> None:
    raw = pack(done=False, lease=lease, ttl=ttl, token=token, fingerprint=fingerprint)
    assert unpack(raw) == Stored(False, 1, lease, ttl, token, fingerprint, None)


@given(st.floats(0.001, 1e9))
def test_without_a_tombstone_the_ttl_is_the_whole_life(ttl: float) -> None:
    read = unpack(pack(done=True, ttl=ttl, token=TOKEN, fingerprint=PRINT))
    assert read is not None
    assert read.span == read.life


def test_the_layout_is_the_one_that_the_scripts_read() -> None:
    raw = packed(None, done=False)
    assert raw[:2] == b"IP"
    assert int.from_bytes(raw[2:10], "big") == 1
    assert int.from_bytes(raw[10:18], "big") == 1500
    assert int.from_bytes(raw[18:26], "big") == 60_000
    assert raw[26:42] == TOKEN
    assert raw[42] == len(PRINT)
    assert raw[HEAD:] == PRINT
    finished = packed(None)
    assert finished[:2] == b"ID"
    assert int.from_bytes(finished[10:18], "big") == 60_000
    assert int.from_bytes(finished[18:26], "big") == 90_000


def test_the_epoch_is_read_from_where_the_script_writes_it() -> None:
    raw = packed(None, done=False)
    later = unpack(raw[:2] + (2**40).to_bytes(8, "big") + raw[10:])
    assert later is not None
    assert later.epoch == 2**40


def test_what_a_release_leaves_is_read_though_it_has_no_fingerprint() -> None:
    times = struct.pack(">Q", 60_000) * 2
    raw = b"IR" + struct.pack(">Q", 2) + times + TOKEN + b"\0"
    assert len(raw) == HEAD
    assert unpack(raw) == Stored(False, 2, 60.0, 60.0, TOKEN, b"", None, released=True)


def test_a_body_is_kept_as_it_was_sent() -> None:
    body = bytes(range(256)) * 3
    assert packed(Reply("http", 200, (), body)).endswith(b"\n" + body)


def test_a_record_without_a_reply_has_nothing_behind_its_fingerprint() -> None:
    assert len(packed(None)) == HEAD + len(PRINT)


@pytest.mark.parametrize(
    "envelope",
    [
        b'[1,"http",200,[]]\nbody',
        b'[1,"http",200,[],4]\nbody',
        b'[3,"http",200,[],4]\nbody',
        b'["2","http",200,[],4]\nbody',
        b'[2,"http",200,[]]\nbody',
        b'[2,"http",200,[],4]\nbody',
        b'[2,"http",200,[],4,null,"more"]\nbody',
        b'[2,"http",200,[],"4",null]\nbody',
        b'[2,"http",200,[],null,null]\nbody',
        b'[2,"http",200,[],4,"0"]\nbody',
        b'[2,"http",200,[],4,1]\nbody',
        b'{"version":2}\nbody',
        b'{"a":2,"b":3,"c":4,"d":5,"e":6}\nbody',
        b"2\nbody",
        b"null\nbody",
        b"\nbody",
        b"\xff\xfe\n",
        b"no json\nbody",
        b"[" * 100_000 + b"\nbody",
        b"\3no json\nbody",
    ],
)
def test_an_envelope_of_another_version_is_done_and_not_replayable(envelope: bytes) -> None:
    assert unpack(with_envelope(envelope)) == stored()


@pytest.mark.parametrize("metadata", ["5", "null", "[5]", '[["name"]]', '[["name","value","more"]]'])
def test_an_envelope_with_metadata_of_another_form_is_not_replayable(metadata: str) -> None:
    assert unpack(with_envelope(f'[2,"http",200,{metadata},0,null]\n'.encode())) == stored()


def test_the_envelope_is_one_line_of_json_and_the_body() -> None:
    meta, _, body = packed()[HEAD + len(PRINT) :].partition(b"\n")
    assert json.loads(meta) == [2, "http", 201, [["link", "a"], ["link", "b"]], 8, None]
    assert body == REPLY.body


@pytest.mark.parametrize("result", [b"", b"=\n\0", b"x" * 300])
def test_an_operations_own_result_is_kept_beside_the_body(result: bytes) -> None:
    reply = replace(REPLY, result=result)
    assert unpack(packed(reply)) == stored(reply)
    assert unpack(packed(reply)[:-1]) == stored()


@pytest.mark.parametrize("missing", range(1, len(packed()) - HEAD - len(PRINT) + 1))
def test_a_reply_that_was_cut_short_is_done_and_not_replayable(missing: int) -> None:
    assert unpack(packed()) == stored(REPLY)
    assert unpack(packed()[:-missing]) == stored()


def test_a_reply_with_more_behind_it_is_not_replayable() -> None:
    assert unpack(packed() + b"\n") == stored()


@pytest.mark.parametrize("length", range(HEAD))
def test_a_record_cut_off_in_its_head_is_no_record(length: int) -> None:
    assert unpack(packed()[:length]) is None


@pytest.mark.parametrize("missing", [1, len(PRINT) - 1, len(PRINT)])
def test_a_record_cut_off_in_its_fingerprint_is_no_record(missing: int) -> None:
    assert unpack(packed(None)[:-missing]) is None


@given(st.binary(max_size=200))
def test_foreign_bytes_are_no_record(raw: bytes) -> None:
    if raw[:2] not in (b"IP", b"ID"):
        assert unpack(raw) is None


@pytest.mark.parametrize("start", [b"XP", b"Ip", b"IX", b"SD", b"\0\0"])
def test_a_record_with_another_mark_at_its_head_is_no_record(start: bytes) -> None:
    assert unpack(start + packed()[2:]) is None


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_reply_goes_back_to_the_door_that_wrote_it(protocol: str) -> None:
    read = unpack(packed(Reply(cast("Protocol", protocol), 5, (), b"")))
    assert read is not None
    assert read.reply is not None
    assert read.reply.protocol == protocol


# Sealed: the head is the one that the scripts read, and only what stands behind the fingerprint is another.


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("keys", [None, {"a": bytes(32)}])
@pytest.mark.parametrize("reply", [REPLY, replace(REPLY, body=b"x" * 3000, result=b"y" * 3000), None])
def test_a_sealed_record_is_read_as_it_was_written(
    reply: Reply | None, keys: dict[str, bytes] | None, compress: bool
) -> None:
    sealing = Sealing(compress=compress, keys=keys)
    seal, unseal = partial(sealing.seal, name="record"), partial(sealing.open, name="record")
    raw = pack(done=True, ttl=60, tombstone=30, token=TOKEN, fingerprint=PRINT, reply=reply, seal=seal)
    assert raw.startswith(packed(None))
    assert unpack(raw, unseal) == stored(reply)
    if keys is not None:
        assert unpack(raw) == stored()


@pytest.mark.parametrize("reply", [REPLY, replace(REPLY, body=b"x" * 3000)], ids=["short", "compressed"])
def test_a_sealed_record_with_any_other_byte_is_done_and_not_replayable(reply: Reply) -> None:
    sealing = Sealing(compress=True, keys={"a": bytes(32)})
    unseal = partial(sealing.open, name="record")
    raw = pack(
        done=True,
        ttl=60,
        tombstone=30,
        token=TOKEN,
        fingerprint=PRINT,
        reply=reply,
        seal=partial(sealing.seal, name="record"),
    )
    for at in range(HEAD + len(PRINT), len(raw)):
        for flip in range(1, 256):
            assert unpack(raw[:at] + bytes([raw[at] ^ flip]) + raw[at + 1 :], unseal) == stored()
