"""The rules of the house, read off the code: who imports whom, and who may know Ray, MLflow and Dagster."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = [
    "ingest",
    "shards",
    "loading",
    "models",
    "objectives",
    "distillation",
    "training",
    "evaluation",
    "registry",
    "scoring",
    "cluster",
]
# What people ask of a dataset is read by the loader: two methods that hand on to it.
EXPORTS = ("shards/dataset.py", ("mmflow.loading.cache", "mmflow.loading.exports"))
RAY = (
    "ingest/",
    "shards/build.py",
    "shards/select.py",
    "loading/exports.py",
    "distillation/cache.py",
    "training/workers.py",
    "scoring/",
    "cluster/",
)

LOWEST = ("mmflow.training_stages", "mmflow.stages", "mmflow.cli", "mmflow.report")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def sources() -> list[tuple[str, set[str]]]:
    return [(str(path.relative_to(ROOT / "mmflow")), imports(path)) for path in sorted((ROOT / "mmflow").rglob("*.py"))]


def test_a_package_imports_only_those_above_it() -> None:
    for name, imported in sources():
        package = name.split("/")[0]
        if package not in PACKAGES:
            continue
        allowed = PACKAGES[: PACKAGES.index(package) + 1]
        for module in imported:
            if name == EXPORTS[0] and module in EXPORTS[1]:
                continue
            if module.startswith("mmflow.") and module.split(".")[1] in PACKAGES:
                assert module.split(".")[1] in allowed, f"mmflow/{name} imports {module}"
            assert module not in LOWEST, f"mmflow/{name} imports {module}"


def test_ray_mlflow_and_dagster_stay_where_they_belong() -> None:
    for name, imported in sources():
        roots = {module.split(".")[0] for module in imported}
        assert "ray" not in roots or name.startswith(RAY), f"mmflow/{name} imports ray"
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
