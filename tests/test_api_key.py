"""The keys of the endpoint: digests, the file of further keys, and that it is read again without a restart."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kraken.config import ConfigError
from serve.api_key import CHECK_INTERVAL_S, ApiKey, ApiKeyDigest, KeyRing, read_keys

ROOT = Path(__file__).parent.parent
OWN = ApiKeyDigest.of(ApiKey("own"))


def write(file: Path, *digests: ApiKeyDigest) -> None:
    """As an editor does: a new file takes the place of the old one."""
    other = file.with_suffix(".new")
    other.write_text("# keys\n\n" + "".join(f"{digest.line()}\n" for digest in digests))
    os.replace(other, file)


def test_a_line_holds_the_digest_and_not_the_key() -> None:
    digest = ApiKeyDigest.of(ApiKey("secret-value"), "ann", 90)
    assert ApiKeyDigest.parse(digest.line()) == digest and "secret" not in digest.line() + repr(digest)
    assert digest.matches("secret-value") and digest.matches(" secret-value ") and not digest.matches("secret-valuf")
    assert ApiKeyDigest.of(ApiKey("secret-value"), "ann", 90).digest != digest.digest


def test_the_command_makes_a_key_that_the_file_lets_in(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve.api_key", "ann", "90"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    file = tmp_path / "keys"
    file.write_text(made.stdout)
    key = made.stderr.split()[-1]
    found = KeyRing(OWN, str(file)).find(key)
    assert found and (found.name, found.requests_per_minute) == ("ann", 90) and key not in made.stdout


def test_a_changed_file_is_read_again_and_a_broken_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    file = tmp_path / "keys"
    ann, bob = (ApiKeyDigest.of(ApiKey(f"of-{name}"), name) for name in ("ann", "bob"))
    write(file, ann)
    ring = KeyRing(OWN, str(file))
    assert ring.find("of-ann") == ann and ring.find("own") == OWN and ring.find("of-bob") is None
    write(file, bob)
    now += CHECK_INTERVAL_S
    assert ring.find("of-bob") == bob and ring.find("of-ann") is None
    for spoil in (lambda: file.write_text("bob of-bob\n"), file.unlink):
        spoil()
        now += CHECK_INTERVAL_S
        assert ring.find("of-bob") == bob and "of-bob" not in caplog.text
    assert caplog.text.count("The keys stay as they were") == 2
    write(file, ann)
    now += CHECK_INTERVAL_S
    assert ring.find("of-ann") == ann and ring.find("of-bob") is None


def test_a_limit_is_a_minutes_requests_at_once_and_then_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    key, ring = ApiKeyDigest.of(ApiKey("k"), "ann", 30), KeyRing(OWN)
    assert [ring.take(key) for _ in range(31)] == [0.0] * 30 + [pytest.approx(2.0)]
    now += 1.0
    assert ring.take(key) == pytest.approx(1.0)
    now += 1.0
    assert [ring.take(key), ring.take(key)] == [0.0, pytest.approx(2.0)]
    now += 3600
    assert sum(ring.take(key) == 0.0 for _ in range(100)) == 30
    assert all(ring.take(OWN) == 0.0 for _ in range(1000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ann secret", "line 1 is not"),
        ("# x\nann", "line 2 is not"),
        (f"{ApiKeyDigest.of(ApiKey('k'), 'ann').line()} -1", "line 1 is not"),
        (f"{ApiKeyDigest.of(ApiKey('k'), 'ann').line()} nan", "line 1 is not"),
        (f"{ApiKeyDigest.of(ApiKey('k'), 'ann').line()}\n" * 2, "ann stands twice"),
        (ApiKeyDigest.of(ApiKey("k")).line(), "default stands twice"),
    ],
)
def test_a_wrong_file_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_keys(file)
    assert "secret" not in str(caught.value)


def test_a_file_needs_the_key_of_whoever_deploys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs KRAKEN_API_KEY"):
        KeyRing(None, str(tmp_path / "keys"))
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing(OWN, str(tmp_path / "keys"))
    assert KeyRing(None).is_open and not KeyRing(OWN).is_open
