"""The private names of Ray that this project uses are in the installed Ray, and one that is missing is explained."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

import pipelines.ray_internals
import serve.ray_internals
from serve.ray_internals import RAY_VERSION, PrivateName

ROOT = Path(__file__).parent.parent
NAMES = (*serve.ray_internals.PRIVATE_NAMES, *pipelines.ray_internals.PRIVATE_NAMES)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"{name.module}.{name.path}")
def test_the_installed_ray_has_it(name: PrivateName) -> None:
    name.load()  # raises with the name and its purpose


@pytest.mark.parametrize("module", [serve.ray_internals, pipelines.ray_internals], ids=lambda module: module.__name__)
def test_every_name_is_in_the_list(module: object) -> None:
    named = [value for value in vars(module).values() if isinstance(value, PrivateName)]
    assert set(named) <= set(module.PRIVATE_NAMES)  # type: ignore[attr-defined]
    assert all(name.purpose and name.ray_version for name in module.PRIVATE_NAMES)  # type: ignore[attr-defined]


def test_the_pinned_ray_is_the_one_that_was_checked() -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None and pinned[1] == RAY_VERSION, "check each name in ray_internals.py, then its RAY_VERSION"


@pytest.mark.parametrize(
    ("module", "path"),
    [("ray.no_such_module", "name"), ("ray.train", "NoSuchClass"), ("ray.train", "ScalingConfig._no_such_member")],
)
def test_a_name_that_moved_is_explained(module: str, path: str) -> None:
    name = PrivateName(module, path, "place the workers")
    reason = rf"has no {re.escape(f'{module}.{path}')} .* needed to place the workers. Install Ray {RAY_VERSION}"
    with pytest.raises(ImportError, match=reason):
        name.load()


def test_a_class_that_moved_is_explained_where_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = PrivateName("ray.train", "NoSuchClass", "choose the nodes of every worker group")
    monkeypatch.setitem(pipelines.ray_internals.TRAIN_CLASSES, "ScalingPolicy", moved)
    monkeypatch.delitem(sys.modules, "pipelines.training.restarts", raising=False)
    with pytest.raises(ImportError, match="ray.train.NoSuchClass .* needed to choose the nodes of every worker group"):
        importlib.import_module("pipelines.training.restarts")


def test_types_and_classes_of_ray_train_agree() -> None:
    """What a type checker sees, and what is loaded."""
    tree = ast.parse(Path(pipelines.ray_internals.__file__).read_text())
    seen = {
        alias.asname: (node.module, alias.name)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: (it.module, it.path) for name, it in pipelines.ray_internals.TRAIN_CLASSES.items()}
