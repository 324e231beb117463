"""Who may import whom, and what stays unloaded until it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import smoothcache

PACKAGE = Path(smoothcache.__file__).parent

# A module may import those of its own rank and below, through private modules as well, which have
# no rank of their own. `schedule` refuses unknown predictors, so their table lies below it.
RANKS = (
    {"errors", "distance", "costs", "predictors", "denoisers", "diffusers_io", "version"},
    {"layers", "calibration", "schedule", "routers"},
    {"planners"},
    {"calibrate", "apply", "clock", "learn", "observe", "summary"},
    {"search", "metrics", "plots", "report", "compare", "benchmark", "methods"},
    {"demo", "cli", "__main__"},
)
RANK = {module: rank for rank, modules in enumerate(RANKS) for module in modules}
OPTIONAL = {
    "diffusers",
    "matplotlib",
    "typer",
    "rich",
    "click",
    "torchmetrics",
    "transformers",
    "accelerate",
    "PIL",
}


def modules_after(statement: str) -> set[str]:
    """Names of the modules that are loaded after a statement in a fresh process."""
    code = f"{statement}\nimport sys\nprint(*sorted(sys.modules))"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def imports(path: Path, *, where: str = "anywhere") -> set[str]:
    """Modules that a file imports by name, `where` "anywhere" or at "module" level.

    Imports for type checkers alone do not count.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo.extend(node.orelse)
            continue
        if where == "module" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = path.relative_to(PACKAGE.parent).parts
            base = list(parents[: len(parents) - node.level]) if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{prefix}.{alias.name}" for alias in node.names)
        todo.extend(ast.iter_child_nodes(node))
    return found


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def noun(path: Path) -> str:
    """The module or family of modules that a source file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_importing_smoothcache_loads_nothing_heavy() -> None:
    loaded = {name.partition(".")[0] for name in modules_after("import smoothcache")}
    assert not loaded & OPTIONAL


def test_optional_packages_wait_until_they_are_used() -> None:
    modules = ("metrics", "plots", "report", "compare", "demo")
    statement = "import " + ", ".join(f"smoothcache.{module}" for module in modules)
    loaded = {name.partition(".")[0] for name in modules_after(statement)}
    assert not loaded & OPTIONAL


@cache
def own_imports() -> dict[str, set[str]]:
    """Module or family of the package -> those that it imports, wherever in the file."""
    found: dict[str, set[str]] = {}
    for path in source_files():
        inner = (name.split(".") for name in imports(path) if name.startswith("smoothcache."))
        found.setdefault(noun(path), set()).update(parts[1] for parts in inner)
    return found


def test_every_module_has_its_rank() -> None:
    public = {module for module in own_imports() if module == "__main__" or module[0] != "_"}
    assert public <= set(RANK), "give the new module a rank above"


def reached_from(module: str, *, through: Callable[[str], bool]) -> set[str]:
    """All that a module imports, and what those of them import that `through` lets pass."""
    graph = own_imports()
    reached: set[str] = set()
    todo = [module]
    while todo:
        new = graph.get(todo.pop(), set()) - reached
        reached |= new
        todo += filter(through, new)
    return reached


@pytest.mark.parametrize("module", sorted(RANK))
def test_imports_only_point_down(module: str) -> None:
    reached = reached_from(module, through=lambda name: name not in RANK)
    assert not {name for name in reached if RANK.get(name, -1) > RANK[module]}


def test_serving_needs_only_a_schedule() -> None:
    reached = reached_from("apply", through=lambda name: True)
    unwanted = {"calibrate", "calibration", "search", "metrics", "plots", "report", "demo", "cli"}
    assert not reached & unwanted


# A pipeline of the demo's own: its classes are subclasses of those of diffusers, so its files need
# diffusers as soon as they are imported. Nothing else imports them but who loads that pipeline.
OWN_PIPELINE = PACKAGE / "demo" / "stdit"


def test_one_file_alone_imports_diffusers() -> None:
    importing = {
        str(path.relative_to(PACKAGE))
        for path in source_files()
        if OWN_PIPELINE not in path.parents
        and any(name.partition(".")[0] == "diffusers" for name in imports(path))
    }
    assert importing <= {"diffusers_io.py"}


def test_nothing_imports_the_demos_own_pipeline() -> None:
    importing = {
        str(path.relative_to(PACKAGE))
        for path in source_files()
        if OWN_PIPELINE not in path.parents
        and any(name.startswith("smoothcache.demo.stdit") for name in imports(path))
    }
    assert not importing


def test_optional_packages_are_imported_inside_functions() -> None:
    # The command line is all typer and rich, and nothing else imports it.
    eager = {
        str(path.relative_to(PACKAGE)): sorted(found)
        for path in source_files()
        if path.name != "cli.py" and OWN_PIPELINE not in path.parents
        if (found := {name.partition(".")[0] for name in imports(path, where="module")} & OPTIONAL)
    }
    assert not eager
