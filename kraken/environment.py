"""The process's environment: variables for a while, the user's name, and a home directory where there is none."""

import contextlib
import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables, and put back what was there before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def user_name() -> str:
    """The user's name, for names of files and folders; `uid12345` where the system knows no name for the user id."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        return f"uid{os.getuid()}"


def provide_home() -> None:
    """Set HOME and USER where the process has neither a home directory nor a user name.

    A container that runs under an arbitrary user id has no entry in the password database. MLflow and torch ask for the
    home directory and the user's name while they are imported, and fail without. Child processes inherit both
    variables. HOME becomes a folder that only this user can enter, below the machine's temporary folder.

    Raises:
        OSError: the folder belongs to another user, or cannot be made.
    """
    try:
        Path.home()
    except RuntimeError:
        home = Path(tempfile.gettempdir()) / f"kraken-{user_name()}" / "home"
        home.parent.mkdir(mode=0o700, exist_ok=True)
        home.mkdir(mode=0o700, exist_ok=True)
        if home.parent.stat().st_uid != os.getuid() or home.parent.is_symlink():
            raise PermissionError(f"{home.parent} belongs to another user; remove it, or set HOME") from None
        os.environ["HOME"] = str(home)
    os.environ.setdefault("USER", user_name())
