"""Reads source and finds every use of a TensorRT-LLM symbol, and those that the table does not know.

A small inference of types, enough for the way in which `kraken/trtllm/` is written: parameters and results annotated
with a symbol, `self.x = Symbol(...)`, and the names that `kraken.trtllm.compat` gives.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from kraken.trtllm import compat

TABLE = compat.signatures()
FIELDS = "tensorrt_llm.llmapi.llm_args.TorchLlmArgs.fields"
MEMBERS = {
    ("Attention", "qkv_proj"): "Linear",
    ("Attention", "o_proj"): "Linear",
    ("ModelConfig", "mapping"): "Mapping",
}
"""(symbol, attribute) -> the symbol that the attribute is an instance of."""
ENUMS = ("AllReduceStrategy", "AllReduceFusionOp", "TensorParallelMode")
ONLY_THEIRS = ("generate_async", "setup_async", "collective_rpc", "get_stats_async")
"""Methods whose names betray TensorRT-LLM whatever the object is called."""
OF_ANY_MODULE = ("data", "weight", "bias", "parameters", "named_parameters")


def qualified(symbol: str) -> str:
    return f"{compat.MODULES[symbol]}.{symbol}"


def inherited(key: str) -> str:
    """The key under which the table has a method."""
    return key if key in TABLE else key.replace("AsyncLLM.", "LLM.")


class Checker:
    """Finds the violations of one file."""

    def __init__(self, source: str, name: str):
        self.name, self.tree = name, ast.parse(source)
        self.violations: list[str] = []
        self.used: set[str] = set()
        self.passed: dict[str, set[str]] = {}
        self.guarded: set[str] = set()
        self.symbols: dict[str, str] = {}
        self.functions: dict[str, str] = {}
        self.dictionaries: dict[str, set[str]] = {}
        self.attributes: dict[str, dict[str, str]] = {}
        self.collect()
        self.check_imports()
        self.check_scope(self.tree, {})

    def collect(self) -> None:
        """Names of symbols, functions that return one, dictionaries with known keys."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module == "kraken.trtllm.compat":
                self.symbols |= {a.asname or a.name: a.name for a in node.names if a.name in compat.MODULES}
        self.used = set(self.symbols.values())
        for node in ast.walk(self.tree):
            # passed only where it exists: `"name" in TorchLlmArgs.model_fields`
            if isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "TorchLlmArgs.model_fields":
                self.guarded.add(ast.literal_eval(node.left))
            if isinstance(node, ast.FunctionDef):
                if (symbol := self.annotated(node.returns)) is not None:
                    self.functions[node.name] = symbol
                for statement in ast.walk(node):
                    if isinstance(statement, ast.Return) and isinstance(statement.value, ast.Dict):
                        self.dictionaries[node.name] = keys_of(statement.value) | added_keys(node)
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Dict)
                and isinstance(node.targets[0], ast.Name)
            ):
                self.dictionaries.setdefault(node.targets[0].id, set()).update(keys_of(node.value))
        for cls in (n for n in ast.walk(self.tree) if isinstance(n, ast.ClassDef)):
            own = self.attributes.setdefault(cls.name, {})
            for function in (n for n in cls.body if isinstance(n, ast.FunctionDef)):
                known = self.parameters(function)
                for target, value in assignments(function):
                    symbol = self.type_of(value, known)
                    if symbol and isinstance(target, ast.Attribute):
                        own[f"self.{target.attr}"] = symbol

    def check_imports(self) -> None:
        for node in ast.walk(self.tree):
            modules = []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names if alias.name != "tensorrt_llm"]
            for module in modules:
                if module.split(".")[0] == "tensorrt_llm":
                    self.report(node, f"imports {module} instead of asking kraken.trtllm.compat")
        for symbol in sorted(self.used):
            if not any(key == qualified(symbol) or key.startswith(qualified(symbol) + ".") for key in TABLE):
                self.violations.append(f"{self.name}: {qualified(symbol)} is not in the table")

    def check_scope(self, scope: ast.AST, known: dict[str, str]) -> None:
        """Everything below, a function with the types of its own names."""
        for node in ast.iter_child_nodes(scope):
            inner = known
            if isinstance(node, ast.ClassDef):
                self.check_overrides(node)
                inner = known | self.attributes[node.name]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = known | self.parameters(node)
                for target, value in assignments(node):
                    symbol = self.type_of(value, inner)
                    if isinstance(target, ast.Name) and symbol:
                        inner[target.id] = symbol
            if isinstance(node, ast.Call):
                self.check_call(node, known)
            if isinstance(node, ast.Attribute):
                self.check_attribute(node, known)
            self.check_scope(node, inner)

    def check_call(self, call: ast.Call, known: dict[str, str]) -> None:
        if ast.unparse(call.func) == "functools.partial":
            call = ast.copy_location(ast.Call(call.args[0], call.args[1:], call.keywords), call)
        if isinstance(call.func, ast.Name) and call.func.id in self.symbols:
            symbol = self.symbols[call.func.id]
            key = qualified(symbol) if qualified(symbol) in TABLE else f"{qualified(symbol)}.__init__"
            self.check_arguments(call, key)
        elif isinstance(call.func, ast.Attribute) and call.func.attr in ONLY_THEIRS:
            keys = [k for k in TABLE if k.endswith(f"LLM.{call.func.attr}")]
            self.check_arguments(call, keys[0])
        elif isinstance(call.func, ast.Attribute) and (symbol := self.type_of(call.func.value, known)):
            if (symbol, call.func.attr) in MEMBERS:
                return
            self.check_arguments(call, f"{qualified(symbol)}.{call.func.attr}")
        elif symbol := self.type_of(call.func, known):
            self.check_arguments(call, f"{qualified(symbol)}.forward")

    def check_arguments(self, call: ast.Call, key: str) -> None:
        key = inherited(key)
        if key not in TABLE:
            self.report(call, f"{key} is not in the table")
            return
        allowed = set(TABLE[key])
        names = set(TABLE[key][: len(call.args)])
        for keyword in call.keywords:
            if keyword.arg is not None:
                names.add(keyword.arg)
            elif (keys := self.keys_behind(keyword.value)) is not None:
                names |= keys
            elif "**kwargs" in TABLE[key] and ast.unparse(keyword.value) == "kwargs":
                names.add("**kwargs")  # handed on as they came
            else:
                self.report(call, f"{key}: **{ast.unparse(keyword.value)} cannot be checked")
        if key.endswith("LLM.__init__"):  # it hands on what it does not know itself
            self.note(FIELDS, names - allowed - self.guarded)
            allowed |= self.guarded | set(TABLE[FIELDS])
        self.note(key, names & set(TABLE[key]))
        for name in sorted(names - allowed):
            self.report(call, f"{key} has no parameter {name}")
        if len(call.args) > len(TABLE[key]):
            self.report(call, f"{key} takes {len(TABLE[key])} positional arguments")

    def check_attribute(self, node: ast.Attribute, known: dict[str, str]) -> None:
        if isinstance(node.value, ast.Name) and self.symbols.get(node.value.id) in ENUMS:
            self.note(qualified(self.symbols[node.value.id]), {node.attr})
            if node.attr not in TABLE[qualified(self.symbols[node.value.id])]:
                self.report(node, f"{self.symbols[node.value.id]} has no member {node.attr}")
            return
        symbol = self.type_of(node.value, known)
        if symbol is None or node.attr in OF_ANY_MODULE:
            return
        prefix = qualified(symbol)
        if inherited(f"{prefix}.{node.attr}") in TABLE:
            return
        self.note(f"{prefix}.attributes", {node.attr})
        if node.attr not in TABLE.get(f"{prefix}.attributes", []):
            self.report(node, f"{prefix} has no attribute {node.attr}")

    def check_overrides(self, cls: ast.ClassDef) -> None:
        """A method that TensorRT-LLM calls takes what it passes; `super().__init__` gets what the base takes."""
        for base in cls.bases:
            if not (isinstance(base, ast.Name) and base.id in self.symbols):
                continue
            prefix = qualified(self.symbols[base.id])
            for function in (n for n in cls.body if isinstance(n, ast.FunctionDef)):
                theirs = TABLE.get(f"{prefix}.{function.name}")
                if theirs is not None and function.name != "__init__":
                    ours = [a.arg for a in (*function.args.args[1:], *function.args.kwonlyargs)]
                    ours += ["**kwargs"] if function.args.kwarg is not None else []
                    self.note(f"{prefix}.{function.name}", set(ours))
                    if set(ours) != set(theirs):
                        self.report(function, f"{cls.name}.{function.name} does not take what {prefix} is called with")
                for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
                    if (name := ast.unparse(call.func)).startswith("super()."):
                        self.check_arguments(call, f"{prefix}.{name.removeprefix('super().')}")

    def parameters(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str]:
        arguments = (*function.args.args, *function.args.kwonlyargs)
        return {a.arg: symbol for a in arguments if (symbol := self.annotated(a.annotation)) is not None}

    def annotated(self, annotation: ast.expr | None) -> str | None:
        return self.symbols.get(annotation.id) if isinstance(annotation, ast.Name) else None

    def type_of(self, node: ast.expr, known: dict[str, str]) -> str | None:
        """The symbol that an expression is an instance of."""
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if isinstance(node, ast.IfExp):
            return self.type_of(node.body, known) or self.type_of(node.orelse, known)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            symbol = self.symbols.get(node.func.id)
            is_function = symbol is not None and qualified(symbol) in TABLE
            return None if is_function else symbol or self.functions.get(node.func.id)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return known.get(f"self.{node.attr}")
            return MEMBERS.get((self.type_of(node.value, known) or "", node.attr))
        return None

    def keys_behind(self, node: ast.expr) -> set[str] | None:
        """The keys of what is unpacked, where that can be seen."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self.dictionaries.get(node.func.id)
        return self.dictionaries.get(node.id) if isinstance(node, ast.Name) else None

    def note(self, key: str, names: set[str]) -> None:
        self.passed.setdefault(key, set()).update(names)

    def report(self, node: ast.AST, problem: str) -> None:
        self.violations.append(f"{self.name}:{getattr(node, 'lineno', 0)}: {problem}")


def keys_of(node: ast.Dict) -> set[str]:
    return {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def added_keys(function: ast.AST) -> set[str]:
    """Of `name["key"] = value`."""
    targets = [node.targets[0] for node in ast.walk(function) if isinstance(node, ast.Assign)]
    slices = [target.slice for target in targets if isinstance(target, ast.Subscript)]
    return {key.value for key in slices if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def assignments(function: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Pairs of target and value, tuples taken apart."""
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            yield node.target, node.value
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                yield from zip(target.elts, value.elts, strict=True)
            else:
                yield target, value


def check_file(path: Path) -> Checker:
    return Checker(path.read_text(), path.name)
