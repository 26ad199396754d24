"""Reads source trees: what each file imports, and which private names it uses."""

import ast
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("vi_toolkit", "recipes", "tests", "benchmarks")
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}  # documented, in spite of the underscore
BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}


class File(NamedTuple):
    path: str
    module: str
    text: str
    tree: ast.Module


class Import(NamedTuple):
    """``file`` imports ``target``, one of the modules of the tree."""

    file: File
    line: int
    target: str

    def __str__(self):
        return f"{self.file.path}:{self.line} imports {self.target}"


class PrivateUse(NamedTuple):
    """A line that uses a private name, and the library of that name where an import shows it."""

    line: int
    code: str
    library: str


parse = functools.cache(ast.parse)  # the rules read the same files


def files(root: Path, *folders: str) -> list[File]:
    """Every Python file in these folders."""
    found = []
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        relative = path.relative_to(root)
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        text = path.read_text("utf-8")
        found.append(File(relative.as_posix(), module, text, parse(text)))
    return found


def code_cells(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Name and syntax tree of every code cell of the notebooks, without magics."""
    for path in sorted((root / "notebooks").rglob("[!.]*.ipynb")):
        for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"], 1):
            if cell["cell_type"] == "code":
                lines = "".join(cell["source"]).splitlines()
                code = "\n".join("" if line.startswith(("%", "!")) else line for line in lines)
                yield f"{path.relative_to(root).as_posix()}, cell {number}, line ", parse(code)


def imported_names(file: File) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a file, ``from a import b`` as a.b."""
    package = file.module.split(".")
    if not file.path.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for name in node.names:
                yield node.lineno, base if name.name == "*" else f"{base}.{name.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def imports(root: Path) -> list[Import]:
    """Every import of one file of the tree by another.

    Importing a.b.c runs ``a/__init__.py`` and ``a/b/__init__.py`` too. They count where they import
    something themselves, unless the importing file is inside the package and so runs after them.
    """
    known = {file.module: file for file in files(root, *PACKAGES)}
    busy = {module for module, file in known.items() if any(True for _ in imported_names(file))}
    found = {}
    for file in known.values():
        for line, target in imported_names(file):
            while target and target not in known:
                target = target.rpartition(".")[0]  # a name inside the module
            parts = target.split(".")
            around = {".".join(parts[:k]) for k in range(1, len(parts))} & busy
            entered = {m for m in around if not f"{file.module}.".startswith(f"{m}.")}
            for module in sorted({target} | entered, key=len, reverse=True):
                if module not in ("", file.module):
                    found.setdefault((file.module, line, module), Import(file, line, module))
    return list(found.values())


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_own(owner: ast.expr) -> bool:
    """Whether this is self, cls or super()."""
    if isinstance(owner, ast.Call):
        owner = owner.func
    return isinstance(owner, ast.Name) and owner.id in ("self", "cls", "super")


def defined_names(tree: ast.Module) -> set[str]:
    """Functions, classes, fields and variables of a file, and what methods set on self."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and is_own(node.value):
            found |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return found


def private_uses(tree: ast.Module) -> list[PrivateUse]:
    """Uses of private names that the file does not define; self, cls and super() may use any."""
    known = defined_names(tree) | NAMED_TUPLE
    library = {}  # of every imported name
    found = []

    def use(node: ast.AST, owner: ast.expr, name: str, by: str = "") -> None:
        if is_private(name) and name not in known:
            written = ast.unparse(owner)
            origin = library.get(written.partition(".")[0], "")
            found.append(PrivateUse(node.lineno, f"{written}.{name}{by}", origin))

    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = f"{node.module or ''}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                name = base + alias.name
                origin = name.partition(".")[0]
                library[alias.asname or alias.name.partition(".")[0]] = origin
                if any(map(is_private, name.split("."))):
                    found.append(PrivateUse(node.lineno, f"import of {name}", origin))
    for node in nodes:
        if isinstance(node, ast.Attribute) and not is_own(node.value):
            use(node, node.value, node.attr)
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            by_name = isinstance(node.func, ast.Name) and node.func.id in BY_NAME
            if by_name and isinstance(node.args[1], ast.Constant):
                use(node, node.args[0], str(node.args[1].value), " (by name)")
    return sorted(found)
