"""The rules of the house, read off the code: which room may import which, how large files are, and who may know Ray,
MLflow and Dagster."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

README = (ROOT / "README.md").read_text()
# Rooms in the order in which data flows. A room imports itself and the rooms above it, never one below.
ROOMS = re.findall(r"^\| `(\w+)` \|", README[README.index("## Inside") :], flags=re.MULTILINE)
ROOMS.insert(ROOMS.index("stages"), "recipe")  # it composes the settings of the rooms above, and the stages read it
RAY = (
    "cluster/",
    "sources/sources.py",
    "fetch/job.py",
    "cleaning/select.py",
    "dataset/build.py",
    "dataset/opened.py",
    "training/workers.py",
    "inference/runner.py",
)
# Rooms that a bare `python` or `torchrun` can use; training/workers.py is the one adapter to Ray.
WITHOUT_RAY = ("models/", "learning/", "training/loop.py")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / "mmflow").rglob("*.py")):
        yield str(path.relative_to(ROOT / "mmflow")), ast.parse(path.read_text())


def imports(tree: ast.Module) -> set[str]:
    """The modules that a file imports, at its top or within functions; names taken from a package count as modules."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def test_every_file_stands_in_a_room_of_the_map() -> None:
    for name, _ in sources():
        assert name == "__init__.py" or room_of(name) in ROOMS, f"mmflow/{name} is in no room of the map"


def test_a_room_imports_only_those_above_it() -> None:
    wrong = []
    for name, tree in sources():
        if name == "__init__.py":
            continue
        below = ROOMS[ROOMS.index(room_of(name)) + 1 :]
        for module in imports(tree):
            parts = module.split(".")
            if parts[0] == "mmflow" and len(parts) > 1 and parts[1] in below:
                wrong.append(f"mmflow/{name} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_files_import_each_other_in_no_circle() -> None:
    modules = {
        "mmflow." + name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): tree
        for name, tree in sources()
    }
    below = {
        name: {each for each in imports(tree) if each in modules and each != name} for name, tree in modules.items()
    }
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for each in sorted(below[name]):
                walk(each, (*path, name))
            done.add(name)

    for name in modules:
        walk(name, ())


def test_files_and_functions_are_short() -> None:
    long = []
    for name, tree in sources():
        lines = (ROOT / "mmflow" / name).read_text().count("\n")
        if lines > MAX_FILE_LINES:
            long.append(f"mmflow/{name}: {lines} lines")
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.end_lineno is None:
                continue
            if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES:
                long.append(f"mmflow/{name}: {node.name} has {lines} lines")
    assert not long, "\n".join(long)


def test_ray_mlflow_and_dagster_stay_where_they_belong() -> None:
    for name, tree in sources():
        roots = {module.split(".")[0] for module in imports(tree)}
        assert "ray" not in roots or name.startswith(RAY), f"mmflow/{name} imports ray"
        assert "ray" not in roots or not name.startswith(WITHOUT_RAY), f"mmflow/{name} imports ray"
        assert "mlflow" not in roots or name.startswith("registry/"), f"mmflow/{name} imports mlflow"
        assert "dagster" not in roots, f"mmflow/{name} imports dagster"


def test_nothing_unpickles_what_comes_from_outside() -> None:
    for path in [*(ROOT / "mmflow").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("pickle.load", "pickle.loads", "yaml.unsafe_load", "eval", "exec"), path
                if called == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), path
                assert "trust_remote_code" not in ast.unparse(node), path
