"""Floor 1: what stands in Redis in the place of a reply's envelope where that is to be smaller, or secret.

    3 | flags 1 | length of the envelope 4 | of a sealed one: length 1 | id of the key | nonce 12 | the rest

The flags are 1, compressed (zlib), and 2, sealed (AES-256-GCM). What neither is has none of this before it. What can't
be opened is never absent: the operation is done, and its reply can't be shown again.
"""

import hmac
import logging
import re
import zlib
from base64 import b64decode
from collections.abc import Mapping
from os import urandom
from struct import Struct
from typing import TYPE_CHECKING, Literal

from resilience.errors import ConfigurationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

logger = logging.getLogger("resilience")

WORTH = 1024
"""Bytes: an envelope that is no larger is not compressed."""
LARGEST = 2**26
"""Bytes: nothing larger is compressed, and what claims to be larger is not inflated."""

_HEAD = Struct(">BBI")
_MARK = b"\3"  # No JSON begins so: to a process of an earlier version this is an envelope that it can't read.
_COMPRESSED, _SEALED = 1, 2
_NONCE, _KEY = 12, 32
_PROBED = 2**14  # Bytes: of a larger envelope the end is tried first, since packing what is packed costs most.
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_Fault = Literal["unsealed", "unknown key", "broken seal", "damaged"]
_MEANING: dict[_Fault, str] = {
    "unsealed": "it is not sealed, and only sealed ones are accepted",
    "unknown key": "it is sealed with a key that this process was not given",
    "broken seal": "its seal is broken, or it was made for another record",
    "damaged": "it is damaged, or of a later version",
}


class Sealing:
    """Compresses and encrypts what is kept of replies.

    Each seal has a random nonce of 96 bits, so one key is good for 2**32 replies: at 1000 a second, seven weeks.
    A seal is bound to its record's name: a reply that is copied under another name does not open.

    Args:
        compress: whether an envelope of more than 1 KiB is compressed, where that makes it smaller.
        keys: 32 random bytes each by id (1 to 64 letters, digits, ``.``, ``_``, ``-``). The first seals, all open.
            An id is never used again for another secret.
        refuse_unsealed: whether a reply that is not sealed counts as one that can't be opened.

    Raises:
        ConfigurationError: the keys are of another form, or the package ``cryptography`` is missing.
    """

    def __init__(
        self, *, compress: bool = False, keys: Mapping[str, bytes] | None = None, refuse_unsealed: bool = False
    ) -> None:
        if refuse_unsealed and keys is None:
            raise ConfigurationError("refuse_unsealed needs encryption: without keys nothing is sealed.")
        self._compress = compress
        self._keys = {} if keys is None else _prepared(keys)
        self._writing = next(iter(self._keys), None)
        self._refuse_unsealed = refuse_unsealed
        self._told: set[_Fault] = set()

    def seal(self, envelope: bytes, name: str) -> bytes:
        """Return what to keep of ``envelope`` in the record ``name``."""
        small = _compressed(envelope) if self._compress else None
        if self._writing is None:
            return envelope if small is None else _HEAD.pack(_MARK[0], _COMPRESSED, len(envelope)) + small
        flags = _SEALED if small is None else _SEALED | _COMPRESSED
        head = _HEAD.pack(_MARK[0], flags, len(envelope)) + bytes([len(self._writing)]) + self._writing
        nonce = urandom(_NONCE)
        aead, _ = self._keys[self._writing]
        return head + nonce + aead.encrypt(nonce, envelope if small is None else small, head + name.encode())

    def open(self, kept: bytes, name: str) -> bytes | None:
        """Return the envelope that is in ``kept``; None where it can't be had, which is logged once of each kind."""
        found = self._opened(kept, name)
        if isinstance(found, bytes):
            return found
        if found not in self._told:
            self._told.add(found)
            logger.warning(
                "A stored reply can't be opened: %s. Its retries are told that it is done. Told once.", _MEANING[found]
            )
        return None

    def _opened(self, kept: bytes, name: str) -> bytes | _Fault:
        ours = kept[:1] == _MARK
        if ours and len(kept) < _HEAD.size:
            return "damaged"
        flags, length = _HEAD.unpack_from(kept)[1:] if ours else (0, len(kept))
        if flags & ~(_COMPRESSED | _SEALED) or (length > LARGEST and flags & _COMPRESSED):
            return "damaged"
        if kept and self._refuse_unsealed and not flags & _SEALED:
            return "unsealed"
        found: bytes | _Fault = kept
        if flags & _SEALED:
            found = self._unsealed(kept, name)
        elif ours:
            found = kept[_HEAD.size :]
        if flags & _COMPRESSED and isinstance(found, bytes):
            found = _inflated(found, length)
        return "damaged" if isinstance(found, bytes) and len(found) != length else found

    def _unsealed(self, kept: bytes, name: str) -> bytes | _Fault:
        at = _HEAD.size + 1
        head = kept[: at + int.from_bytes(kept[at - 1 : at], "big")]
        key = self._keys.get(head[at:])
        if key is None:
            return "unknown key"
        sealed = memoryview(kept)[len(head) :]  # not one more copy of a large reply
        try:
            return key[0].decrypt(sealed[:_NONCE], sealed[_NONCE:], head + name.encode())
        except Exception:  # a wrong tag, or too little for one
            return "broken seal"

    # -- what stands beside the envelope

    def fingerprint(self, plain: bytes) -> bytes:
        """Return what a new record tells of a payload: with encryption, what only who has the key can compare.

        Args:
            plain: ``<door>:`` and a digest, which anybody could compare with that of a payload that he guesses.
        """
        return plain if self._writing is None else self._keyed(self._writing, plain)

    def fingerprint_like(self, stored: bytes, plain: bytes) -> bytes:
        """Return what ``stored`` would be if it were of the payload of ``plain``, as far as its key is known here."""
        key_id = stored.partition(b":")[0].rpartition(b"/")[2]
        return self._keyed(key_id, plain) if key_id in self._keys else plain

    def token(self, plain: str) -> str:
        """Return a token that follows from a reply so that nobody can guess the reply from it."""
        if self._writing is None:
            return plain
        return hmac.digest(self._keys[self._writing][1], plain.encode(), "sha256").hex()

    def _keyed(self, key_id: bytes, plain: bytes) -> bytes:
        # The id is in the part that says what may be compared: under two keys, fingerprints say nothing of each other.
        door, colon, _ = plain.partition(b":")
        return door + b"/" + key_id + b":" + hmac.digest(self._keys[key_id][1], plain, "sha256") if colon else plain


def keys_from_text(text: str) -> dict[str, bytes]:
    """Read keys as they stand in an environment variable: ``id:base64,id2:base64``, the one that seals first.

    Raises:
        ConfigurationError: it is of another form; shows nothing of it.
    """
    parts = [part.strip().partition(":") for part in text.split(",")]
    keys = {}
    for key_id, _, secret in parts:
        try:
            keys[key_id] = b64decode(secret.translate(_TO_STANDARD), validate=True)
        except ValueError:
            raise ConfigurationError(_FORM) from None
    if len(keys) < len(parts):
        raise ConfigurationError("Two keys have one id.")
    _check(keys)
    return keys


_TO_STANDARD = str.maketrans("-_", "+/")
_FORM = (
    "Keys are given as id:base64,id2:base64, the newest first: an id is 1 to 64 letters, digits, '.', '_' and '-', "
    "and base64 is that of 32 random bytes."
)


def _check(keys: Mapping[str, bytes]) -> None:
    for key_id, secret in keys.items():
        if not _ID.fullmatch(key_id):
            raise ConfigurationError(f"The id of an encryption key is malformed. {_FORM}")
        if not isinstance(secret, bytes) or len(secret) != _KEY:
            raise ConfigurationError(f"An encryption key is not {_KEY} bytes. {_FORM}")
    if not keys:
        raise ConfigurationError("Encryption needs at least one key.")


def _prepared(keys: Mapping[str, bytes]) -> "dict[bytes, tuple[AESGCM, bytes]]":
    _check(keys)
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - only who encrypts needs it
    except ImportError:
        raise ConfigurationError(
            "Encryption needs the package cryptography: install grpc-http-resilience[encryption]."
        ) from None
    # A secret for each use, so that neither tells of the other.
    return {
        key_id.encode(): (
            AESGCM(hmac.digest(secret, b"resilience reply", "sha256")),
            hmac.digest(secret, b"resilience fingerprint", "sha256"),
        )
        for key_id, secret in keys.items()
    }


def _compressed(envelope: bytes) -> bytes | None:
    if not WORTH < len(envelope) <= LARGEST:
        return None
    if len(envelope) > _PROBED and len(zlib.compress(envelope[-4096:], 1)) > 3584:
        return None
    small = zlib.compress(envelope, 1)
    return small if len(small) + _HEAD.size < len(envelope) else None


def _inflated(small: bytes, length: int) -> bytes | _Fault:
    inflater = zlib.decompressobj()
    try:
        found = inflater.decompress(small, length + 1)
    except zlib.error:
        return "damaged"
    return found if inflater.eof and not inflater.unused_data else "damaged"
