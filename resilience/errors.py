"""Ground floor: what can go wrong, split by whose move it is. Raises nothing itself.

A refusal of a call is a value (``verdict.Reject``); these are the accidents.
"""


class ResilienceError(Exception):
    """Base of every exception this distribution raises on purpose."""


class ConfigurationError(ResilienceError, ValueError):
    """The application's own set-up is wrong; the message names the setting and the remedy."""


class StoreUnavailableError(ResilienceError):
    """The store did not answer in time, or could not take more; the policy decides what callers see."""


class PayloadTooLargeError(ResilienceError):
    """A call's payload is over the bound that was asked for.

    Args:
        limit: the bound, in bytes.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(f"The payload is larger than {limit} bytes.")
        self.limit = limit


class ForeignValueError(ResilienceError):
    """Something that is not ours stands under a key of ours. Never a pass: what it stood for is unknown.

    Args:
        key: the store's key, which holds hashes only.
    """

    def __init__(self, key: str) -> None:
        super().__init__(f"The value under {key} was not written by this library. Delete it, or use another prefix.")
        self.key = key
