"""The process's environment: a user id without a name and without a home directory."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from kraken import environment
from kraken.storage import Storage

NAMES = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")


@pytest.fixture
def unknown_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process whose user id has no entry in the password database; gives its temporary folder."""

    def getpwuid(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    for name in NAMES:
        monkeypatch.setenv(name, "before the test")  # restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_user_without_a_name_has_a_cache_of_its_own(unknown_user: Path) -> None:
    assert environment.user_name() == f"uid{os.getuid()}"
    assert Storage("file:///nonexistent").root.parent == unknown_user / f"kraken-uid{os.getuid()}"


def test_a_home_is_provided_where_there_is_none(unknown_user: Path) -> None:
    with pytest.raises(RuntimeError):
        Path.home()
    environment.provide_home()
    assert Path.home() == unknown_user / f"kraken-uid{os.getuid()}" / "home"
    assert Path.home().stat().st_mode & 0o777 == 0o700
    code = "import getpass, pathlib; print(getpass.getuser(), pathlib.Path.home())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [f"uid{os.getuid()}", str(Path.home())], "child processes inherit both"


def test_a_home_that_is_there_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    environment.provide_home()
    assert os.environ["HOME"] == str(tmp_path)


def test_a_home_of_another_user_is_refused(unknown_user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (unknown_user / f"kraken-uid{os.getuid()}").symlink_to(unknown_user)
    with pytest.raises(PermissionError, match="remove it, or set HOME"):
        environment.provide_home()
