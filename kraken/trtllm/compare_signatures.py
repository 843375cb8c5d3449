"""Compares `signatures.json` with the installed TensorRT-LLM, and prints what differs as JSON.

python -m kraken.trtllm.compare_signatures is a process of its own, since the import takes long and starts MPI.
"""

import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from kraken.trtllm.compat import signatures


def differences(table: Mapping[str, Sequence[str]]) -> list[str]:
    """One line for every symbol that is not as the table says; imports TensorRT-LLM.

    Args:
        table: symbol -> names that it must know. `X.fields` and `X.attributes` are those of class X, and a name with
            stars is not compared.
    """
    found = []
    for symbol, names in table.items():
        path, _, kind = symbol.rpartition(".")
        target = _find(path if kind in ("fields", "attributes") else symbol)
        if target is None:
            found.append(f"{symbol} is not there")
        elif missing := [name for name in names if name[0] != "*" and not _knows(target, name, kind)]:
            found.append(f"{symbol} does not know {', '.join(missing)}")
    return found


def _find(path: str) -> Any:
    """The object of a dotted path, through modules and classes; None where there is none.

    For the constructor of a class that pydantic makes, the class: only its fields say what it takes.
    """
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            target: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for name in parts[length:]:
            if name == "__init__" and hasattr(target, "model_fields"):
                return target
            target = getattr(target, name, None)
        return target
    return None


def _knows(target: Any, name: str, kind: str) -> bool:
    """Whether a callable takes a parameter, or a class has a field, attribute or member."""
    if kind != "attributes" and hasattr(target, "model_fields"):
        return name in target.model_fields
    if inspect.isclass(target):
        return hasattr(target, name) or any(_mentions(base, name) for base in inspect.getmro(target))
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # compiled, without a signature
        return True
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _mentions(base: type, name: str) -> bool:
    """Whether a class declares an attribute, or sets it on its instances."""
    if name in getattr(base, "__annotations__", {}):
        return True
    try:
        return f"self.{name}" in inspect.getsource(base)
    except (OSError, TypeError):
        return False


if __name__ == "__main__":
    print(json.dumps(differences(signatures())))
