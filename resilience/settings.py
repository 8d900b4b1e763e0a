"""Floor 3: configuration from the environment, checked before anything starts. Needs pydantic-settings."""

from typing import Self

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from resilience.errors import ConfigurationError
from resilience.stores.base import Store
from resilience.stores.memory import MemoryStore
from resilience.stores.sealing import keys_from_text


class Settings(BaseSettings):
    """What an operator may set, each by the environment variable of its name in capitals, or in ``.env``.

    Subclass it to add an application's own. ``Settings.load()`` reads it.
    """

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", hide_input_in_errors=True)

    rate_limit_enabled: bool = Field(True, description="Whether rate limits are enforced.")
    rate_limit_requests: int = Field(100, ge=1, lt=2**31, description="Requests per window and caller.")
    rate_limit_window: float = Field(60.0, ge=0.001, le=366 * 86400, description="The window, in seconds.")
    rate_limit_replicas: int = Field(1, ge=1, description="How many processes share the limits, for an outage.")
    redis_url: SecretStr | None = Field(None, description="Where counts and records are kept; in memory if unset.")
    idempotency_ttl: float = Field(86_400.0, ge=1, description="How long replies are kept, in seconds.")
    idempotency_lease: float = Field(30.0, ge=1, description="After how long a dead worker's key is free, in seconds.")
    idempotency_compression: bool = Field(False, description="Whether kept replies above 1 KiB are compressed.")
    idempotency_encryption_keys: SecretStr | None = Field(
        None, description="What kept replies are encrypted with: id:base64,id2:base64, of 32 bytes each, newest first."
    )
    health_drain_seconds: float = Field(5.0, ge=0, le=300, description="From unready to the stop, in seconds.")
    health_token: SecretStr | None = Field(None, description="Who brings it to a probe sees details.")

    @field_validator("idempotency_encryption_keys")
    @classmethod
    def _check_keys(cls, keys: SecretStr | None) -> SecretStr | None:
        if keys is not None:
            keys_from_text(keys.get_secret_value())
        return keys

    def store(self) -> Store:
        """Return the store that the settings name: Redis where there is a URL, else this process's memory.

        Raises:
            ConfigurationError: the URL is malformed, or encryption's package is missing; never shows the URL or a key.
        """
        if self.redis_url is None:
            return MemoryStore()
        from resilience.stores.redis import RedisStore  # noqa: PLC0415 - only who has a URL needs the extra

        keys = self.idempotency_encryption_keys
        return RedisStore(
            self.redis_url.get_secret_value(),
            compress=self.idempotency_compression,
            encryption=None if keys is None else keys_from_text(keys.get_secret_value()),
        )

    @classmethod
    def load(cls) -> Self:
        """Read the environment.

        Raises:
            ConfigurationError: names every variable that is wrong and what is expected; never shows a value.
        """
        try:
            return cls()
        except ValidationError as error:
            prefix = cls.model_config.get("env_prefix", "").upper()
            wrong = "; ".join(f"{prefix}{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors() if e["loc"])
            raise ConfigurationError(f"The environment is wrong. {wrong or error.title}") from None
