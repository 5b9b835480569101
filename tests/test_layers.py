"""Imports go down only, and light things stay light: the layers of docs/architecture.md, read from the source with `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster", "deployments", "training", "pipelines", "mmaas")
HEAVY = {"torch", "deepspeed", "mlflow", "transformers", "ray.data"}

# First match counts. A package and its modules share its layer unless they are named before it.
LAYERS: list[tuple[str, int]] = [
    ("cluster.errors", 0),
    ("cluster.types", 0),
    ("cluster.settings", 0),
    ("cluster.log", 0),
    ("cluster.metrics", 0),
    ("cluster.store", 0),
    ("cluster.storage", 0),
    ("cluster.manifest", 0),
    ("cluster.private_files", 0),
    ("cluster", 1),
    ("deployments.engine", 2),
    ("deployments.batching", 2),
    ("deployments.encode", 2),
    ("deployments.predict", 2),
    ("training", 2),
    ("deployments.gateway", 4),
    ("deployments.fleet", 5),
    ("deployments", 3),
    ("pipelines", 5),
    ("mmaas", 6),
]
# Packages of one layer that never import each other: they meet in the registry, the catalog and the store.
APART = [{"deployments.engine", "deployments.predict", "training"}, {"deployments.fleet", "pipelines"}]


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, type-checking blocks left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if not (top_level_only and is_function):
            stack += ast.iter_child_nodes(node)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer(name: str) -> int:
    return next(number for package, number in LAYERS if within(name, package))


def module_of(imported: str, known: dict[str, Path]) -> str | None:
    """The module of ours that an imported name lies in: `cluster.types.NAME` lies in `cluster.types`."""
    while imported and imported not in known:
        imported = imported.rpartition(".")[0]
    return imported or None


def test_imports_go_down_only() -> None:
    known = modules()
    assert len(known) > 20, "the walk found too little to prove anything"
    upward = [
        f"{name} (layer {layer(name)}) imports {target} (layer {layer(target)})"
        for name, path in known.items()
        for target in {module_of(imported, known) for imported in imports(path)} - {None}
        if target and layer(target) > layer(name)
    ]
    assert not upward, "\n".join(upward)


def test_packages_of_one_layer_do_not_import_each_other() -> None:
    known = modules()
    crossed = []
    for group in APART:
        for name, path in known.items():
            own = next((package for package in group if within(name, package)), None)
            others = group - {own} if own else set()
            crossed += [f"{name} imports {target}" for target in imports(path) if any(within(target, other) for other in others)]
    assert not crossed, "\n".join(crossed)


def test_no_module_imports_itself_in_a_circle() -> None:
    known = modules()
    edges = {
        name: {module_of(imported, known) for imported in imports(path, top_level_only=True)} - {None, name}
        for name, path in known.items()
    }
    # `from package import module` also names the package; its __init__ must not be counted as a way back.
    inits = {name for name, path in known.items() if path.name == "__init__.py"}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name in done or name in inits:
            return
        for target in edges[name]:
            assert target is not None
            visit(target, (*trail, name))
        done.add(name)

    for name in known:
        visit(name, ())


@pytest.mark.parametrize(
    "package",
    [
        "cluster",
        "mmaas",
        "deployments.gateway",
        "deployments.fleet",
        "deployments.models",
        "deployments.handles",
        "deployments.router",
        "pipelines",
    ],
)
def test_light_layers_import_heavy_libraries_only_inside_functions(package: str) -> None:
    heavy = [
        f"{name} imports {imported} at its top"
        for name, path in modules().items()
        if within(name, package)
        for imported in imports(path, top_level_only=True)
        if any(within(imported, library) for library in HEAVY)
    ]
    assert not heavy, "\n".join(heavy)


@pytest.mark.parametrize("module", ["cluster.settings", "mmaas.cli", "deployments.gateway", "cluster.launch", "cluster.doctor"])
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(' '.join(name for name in {sorted(HEAVY)} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport os\nif TYPE_CHECKING:\n    import mlflow\n"
        "def work():\n    import torch\n    from cluster.store import Store\n"
    )
    assert set(imports(file)) == {"typing.TYPE_CHECKING", "os", "torch", "cluster.store.Store"}
    assert set(imports(file, top_level_only=True)) == {"typing.TYPE_CHECKING", "os"}
