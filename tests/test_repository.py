"""The repository itself: imports go one way, heavy libraries stay where they belong, the README's commands exist."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "kraken": set[str](),
    "serve": {"kraken"},
    "pipelines": {"kraken", "serve"},
    "jobs": {"kraken", "pipelines"},
}
"""Folder -> the folders it may import from."""
ONLY_HOME = {
    # The first reaches the server, the others record runs and models there: all need MLflow's client and its errors.
    # `pyfunc_model.py` is code that MLflow itself loads, as a subclass of its model.
    "mlflow": (
        "pipelines/tracking.py",
        "pipelines/tracking_server.py",
        "pipelines/registry.py",
        "pipelines/pyfunc_model.py",
    ),
    "tensorrt_llm": ("kraken/trtllm/",),
    "transformers": ("kraken/huggingface/",),
}
"""Library -> the only files and folders that may import it."""


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            travels = path.parent.name == "huggingface"  # with the weights, beside its neighbours
            assert node.level == 0 or travels, f"{path}: relative imports hide the direction"
            modules.add(node.module or "")
    return modules


@pytest.mark.parametrize("folder", LAYERS)
def test_imports_go_one_way(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        for module in imported_modules(path):
            top = module.split(".")[0]
            if top in LAYERS and top != folder:
                assert top in LAYERS[folder], f"{path.relative_to(ROOT)} imports {module}"


def imports_by_module() -> dict[str, set[str]]:
    """Module -> the project's modules that it imports, inside functions and for annotations too."""
    paths = [path for folder in (*LAYERS, "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):  # each imported name may be a module
                named = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                found[name] |= named or ({node.module or ""} & modules.keys())
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & modules.keys()
    return found


def without_ends(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left when whoever imports nothing that is left is taken away again and again: circles, and what leads to
    them."""
    while ends := {name for name, others in imports.items() if not others & imports.keys()}:
        imports = {name: others & imports.keys() for name, others in imports.items() if name not in ends}
    return imports


def test_no_file_imports_another_in_a_circle() -> None:
    imports = imports_by_module()
    assert sum(map(len, imports.values())) > 500
    left = without_ends(imports)
    assert not left, f"circles, or modules that lead to one: {left}"


def test_no_folder_imports_another_in_a_circle() -> None:
    """Folders right below the layers; what lies deeper is part of them."""
    folders: dict[str, set[str]] = {}
    for name, others in imports_by_module().items():
        folder = folder_of(name)
        folders.setdefault(folder, set()).update({folder_of(other) for other in others} - {folder})
    left = without_ends(folders)
    assert not left, f"circles, or folders that lead to one: {left}"


def folder_of(module: str) -> str:
    """`kraken.engine` for `kraken.engine.model.network`; a file right below a layer is its own."""
    return ".".join(module.split(".")[:2])


def test_serving_never_imports_training() -> None:
    for path in (ROOT / "serve").rglob("*.py"):
        for module in imported_modules(path):
            if module.startswith("kraken"):
                allowed = (
                    "kraken.engine",
                    "kraken.choose_engine",
                    "kraken.config",
                    "kraken.tokenizer",
                    "kraken.manifest",
                    "kraken.storage",
                )
                is_version = module == "kraken"  # the package itself holds nothing else
                assert is_version or module.startswith(allowed), f"{path.relative_to(ROOT)} imports {module}"


def test_the_library_knows_no_orchestration() -> None:
    for path in (ROOT / "kraken").rglob("*.py"):
        tops = {module.split(".")[0] for module in imported_modules(path)}
        assert not tops & {"ray", "mlflow", "fastapi", "starlette", "tyro"}, path.relative_to(ROOT)


@pytest.mark.parametrize(("library", "homes"), ONLY_HOME.items())
def test_some_libraries_have_one_importer(library: str, homes: tuple[str, ...]) -> None:
    for folder in LAYERS:
        for path in (ROOT / folder).rglob("*.py"):
            if library in {module.split(".")[0] for module in imported_modules(path)}:
                assert path.relative_to(ROOT).as_posix().startswith(homes)


def test_only_cluster_calls_ray_init() -> None:
    callers = [
        path.relative_to(ROOT).as_posix()
        for folder in LAYERS
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\bray\.init\(", path.read_text())
    ]
    assert callers == ["pipelines/cluster.py"]


def private_ray_names(path: Path) -> set[str]:
    """Private names of Ray that a file imports, reaches as an attribute of an import, or holds in a string."""
    tree = ast.parse(path.read_text())
    imported: dict[str, str] = {}  # local name -> what it stands for
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imported[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                used.add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                used.add(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Constant) and re.fullmatch(r"ray(\.\w+)+", str(node.value)):
            used.add(str(node.value))
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in imported:
            used.add(".".join([imported[node.id], *reversed(parts)]))
    return {name for name in used if re.match(r"ray\.(.*\.)?_|ray\.experimental\b", name)}


@pytest.mark.parametrize("folder", ["serve", "pipelines", "jobs"])
def test_one_file_of_a_folder_uses_private_names_of_ray(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        if path.name != "ray_internals.py":
            assert private_ray_names(path) == set(), f"{path.relative_to(ROOT)}: move them to {folder}/ray_internals.py"


def test_private_names_of_ray_are_found_however_they_are_used(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import ray, ray.train\nfrom ray._private import state\nfrom ray.experimental import internal_kv\n"
        "from ray.serve import context as c\nimport ray._raylet as raylet\nfrom ray.train import Checkpoint\n"
        "c._get_global_client(); ray.nodes(); ray._private.worker.global_worker; load('ray.serve._private.replica')\n"
        "ray.init(); import_module('ray.serve')\n"
    )
    assert private_ray_names(path) == {
        "ray._private.state",
        "ray.experimental.internal_kv",
        "ray.serve.context._get_global_client",
        "ray._raylet",
        *("ray._private", "ray._private.worker", "ray._private.worker.global_worker"),
        "ray.serve._private.replica",
    }


def test_the_settings_of_ray_train_are_in_one_place() -> None:
    files = [
        path.relative_to(ROOT).as_posix()
        for folder in (*LAYERS, "tests")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"""["']RAY_TRAIN_[A-Z]""", path.read_text())
    ]
    assert files == ["pipelines/training/workers.py"]


def test_training_loads_no_ray_and_no_mlflow() -> None:
    heavy = "{'ray', 'mlflow', 'fastapi'}"
    code = f"import sys, kraken.training.train, kraken.engine.engine; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_command_lines_answer_without_loading_torch() -> None:
    code = "import sys, jobs.end_to_end, jobs.local; print(sorted({'torch', 'mlflow'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_pickle_on_load_paths() -> None:
    for folder in LAYERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert not imported_modules(path) & {"pickle", "cloudpickle", "dill", "joblib"}, path
            assert not re.search(r"torch\.load\((?!.*weights_only=True)", path.read_text()), path


def readme_modules() -> list[str]:
    text = (ROOT / "README.md").read_text() if (ROOT / "README.md").is_file() else ""
    return sorted(set(re.findall(r"python -m ((?:jobs|benchmarks)\.\w+)", text)))


@pytest.mark.parametrize("module", readme_modules())
def test_every_readme_command_answers_help(module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower()


def test_the_readme_names_its_commands() -> None:
    assert {"jobs.end_to_end", "jobs.pretrain"} <= set(readme_modules())
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text()
    named = re.findall(r"`((?:kraken|pipelines|jobs|serve|benchmarks|tests|docs|docker)/[\w/.]*)`", text)
    linked = [(document.parent / link) for link in re.findall(r"\]\(([^):#]+)\)", text)]
    missing = [str(path) for path in [*(ROOT / name for name in named), *linked] if not path.exists()]
    assert not missing


def test_functions_that_the_architecture_names_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", text)
    assert len(rows) >= 10
    for path, functions in rows:
        defined = definitions(ast.parse((ROOT / path).read_text()))
        assert set(re.findall(r"`([\w.]+)`", functions)) <= defined, path


FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def definitions(tree: ast.Module) -> set[str]:
    """The functions of a module, methods as `Class.method`."""
    names = set()
    for node in tree.body:
        if isinstance(node, FUNCTIONS):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, FUNCTIONS)}
    return names
