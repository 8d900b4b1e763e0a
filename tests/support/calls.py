"""Calls without a door, for tests of what is below one."""


class Sent:
    """Metadata that a caller sent; an underscore in a name stands for its hyphen."""

    def __init__(self, **values: str) -> None:
        self.sent = {name.replace("_", "-"): value for name, value in values.items()}

    def get(self, name: str) -> str | None:
        return self.sent.get(name)

    def get_all(self, name: str) -> list[str]:
        return [self.sent[name]] if name in self.sent else []
