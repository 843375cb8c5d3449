"""The keys that clients show. One comes from the environment; a file may name more, each with a rate limit. Only salted
digests of keys are kept: in the file, and in the running application.

    python -m serve.api_key NAME 600      # a new key, and its line for the file: at most 600 requests a minute

A line of the file is `NAME SALT:DIGEST [REQUESTS_PER_MINUTE]`; empty lines and lines that begin with # are skipped. The
file is read again when it changes, without a restart.
"""

import hashlib
import hmac
import logging
import os
import secrets
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from kraken.config import ConfigError

API_KEY_VARIABLE = "KRAKEN_API_KEY"
DEFAULT_NAME = "default"
"""Name of the key from the environment."""
CHECK_INTERVAL_S = 1.0
"""Shortest time between two checks whether the file has changed."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key, for the arguments of a task; its `repr` does not show it."""

    value: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ApiKeyDigest:
    """What a replica compares keys with. Two digests of one key differ, so that no record of one identifies a key."""

    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)
    name: str = DEFAULT_NAME
    requests_per_minute: float = 0.0
    """Of each replica; 0 sets no limit."""

    @classmethod
    def of(cls, key: ApiKey, name: str = DEFAULT_NAME, requests_per_minute: float = 0.0) -> "ApiKeyDigest":
        """The digest of a key under a new random salt."""
        salt = secrets.token_bytes(32)
        return cls(salt, _hash(salt, key.value), name, requests_per_minute)

    @classmethod
    def parse(cls, line: str) -> "ApiKeyDigest":
        """A line of the file.

        Raises:
            ValueError: the line has another form.
        """
        name, hashed, *rest = line.split()
        salt, _, digest = hashed.partition(":")
        limit = float(rest[0]) if rest else 0.0
        if len(rest) > 1 or not 0 <= limit < float("inf"):
            raise ValueError(line)
        found = cls(bytes.fromhex(salt), bytes.fromhex(digest), name, limit)
        if len(found.salt) < 16 or len(found.digest) != hashlib.sha256().digest_size:
            raise ValueError(line)
        return found

    def line(self) -> str:
        """The digest as a line of the file."""
        limit = f" {self.requests_per_minute:g}" if self.requests_per_minute else ""
        return f"{self.name} {self.salt.hex()}:{self.digest.hex()}{limit}"

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


class KeyRing:
    """All keys of an endpoint, and how many requests each may still send.

    Args:
        key: from the environment; None lets every client in.
        file: names more keys; empty for none.

    Raises:
        ConfigError: the file cannot be read, or there is one without a key in the environment, which whoever deploys
            needs to look at the endpoint.
    """

    def __init__(self, key: ApiKeyDigest | None, file: str = ""):
        if file and key is None:
            raise ConfigError(f"serve.api_keys_file={file} needs {API_KEY_VARIABLE} in the environment too; set it")
        self._own = () if key is None else (key,)
        self._file = Path(file) if file else None
        self._keys = (*self._own, *read_keys(self._file)) if self._file else self._own
        self._version = self._file_version()
        self._checked_at = time.monotonic()
        self._buckets: dict[str, _Bucket] = {}

    @property
    def is_open(self) -> bool:
        """Whether clients need no key."""
        return not self._own

    def find(self, shown: str) -> ApiKeyDigest | None:
        """The key that a client shows; None for a wrong one. Takes as long for a right key as for a wrong one."""
        self._reload_if_changed()
        matches = [key for key in self._keys if key.matches(shown)]
        return matches[0] if matches else None

    def take(self, key: ApiKeyDigest) -> float:
        """Count a request; returns the seconds after which the key may send one, 0 if it may now."""
        if not key.requests_per_minute:
            return 0.0
        bucket = self._buckets.get(key.name)
        if bucket is None or bucket.per_minute != key.requests_per_minute:
            bucket = self._buckets[key.name] = _Bucket(key.requests_per_minute)
        return bucket.take()

    def _reload_if_changed(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._checked_at < CHECK_INTERVAL_S:
            return
        self._checked_at = now
        version = self._file_version()
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = (*self._own, *read_keys(self._file))
        except ConfigError as error:  # half written, or gone: nobody is let in or locked out by that
            logger.error("The keys stay as they were: %s", error)

    def _file_version(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._file) if self._file else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None


class _Bucket:
    """A minute's requests may come at once, further ones in steps."""

    def __init__(self, per_minute: float):
        self.per_minute = per_minute
        self._left = max(1.0, per_minute)
        self._counted_at = time.monotonic()

    def take(self) -> float:
        now = time.monotonic()
        per_s = self.per_minute / 60
        self._left = min(max(1.0, self.per_minute), self._left + (now - self._counted_at) * per_s)
        self._counted_at = now
        if self._left >= 1.0:
            self._left -= 1.0
            return 0.0
        return (1.0 - self._left) / per_s


def read_keys(file: Path) -> list[ApiKeyDigest]:
    """The keys of a file.

    Raises:
        ConfigError: the file cannot be read, a line has another form, or a name stands twice.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"serve.api_keys_file={file} cannot be read: {error}") from None
    keys: list[ApiKeyDigest] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            keys.append(ApiKeyDigest.parse(line))
        except ValueError:  # without the line, which may hold a key by mistake
            raise ConfigError(
                f"serve.api_keys_file={file}: line {number} is not `NAME SALT:DIGEST [REQUESTS_PER_MINUTE]`; "
                "`python -m serve.api_key NAME` makes one"
            ) from None
    names = [DEFAULT_NAME, *(key.name for key in keys)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"serve.api_keys_file={file}: the name {twice} stands twice; {DEFAULT_NAME} is taken")
    return keys


def main(argv: list[str]) -> None:
    """Make a key: the key goes to the standard error, its line to the standard output, for `>> FILE`."""
    try:
        name, limit = argv[0], float(argv[1]) if len(argv) == 2 else 0.0
        if len(argv) > 2 or name.split() != [name] or not 0 <= limit < float("inf"):
            raise ValueError(argv)
    except (IndexError, ValueError):
        raise SystemExit("usage: python -m serve.api_key NAME [REQUESTS_PER_MINUTE] >> FILE") from None
    key = ApiKey(secrets.token_urlsafe(32))
    print(f"key of {name}, which is stored nowhere: {key.value}", file=sys.stderr)
    print(ApiKeyDigest.of(key, name, limit).line())


if __name__ == "__main__":
    main(sys.argv[1:])
