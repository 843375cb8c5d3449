"""The key that clients show: read from the environment; the running application knows a salted digest of it."""

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, field

from kraken.config import ConfigError

API_KEY_VARIABLE = "KRAKEN_API_KEY"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key, for the arguments of a task; its `repr` does not show it."""

    value: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ApiKeyDigest:
    """What a replica compares keys with. Two digests of one key differ, so that no record of one identifies a key."""

    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)

    @classmethod
    def of(cls, key: ApiKey) -> "ApiKeyDigest":
        """The digest of a key under a new random salt."""
        salt = secrets.token_bytes(32)
        return cls(salt, _hash(salt, key.value))

    def matches(self, shown: str) -> bool:
        """Whether a client's key is this one, in a time that does not depend on the key."""
        return hmac.compare_digest(_hash(self.salt, shown.strip()), self.digest)


def _hash(salt: bytes, key: str) -> bytes:
    return hmac.digest(salt, key.encode(), hashlib.sha256)


def api_key() -> ApiKey | None:
    """The key in the environment; None lets every client in.

    Raises:
        ConfigError: the variable is set but empty.
    """
    key = os.environ.get(API_KEY_VARIABLE)
    if key is None:
        return None
    if not key.strip():
        raise ConfigError(f"{API_KEY_VARIABLE} is set but empty; give it a key, or unset it to let every client in")
    return ApiKey(key.strip())
