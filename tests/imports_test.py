"""The import graph of the package: no cycles, and no heavy import where inference runs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "stoa_jax"


def module_files():
    """Return `{module name: file}` of the package."""
    files = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported_modules(path, known):
    """Return the modules of the package that a file imports, anywhere in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` imports the module; `from module import name` does not.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known) or {node.module}
            if names - known:
                found.add(node.module)
    return found & known


def cycles(graph):
    """Strongly connected components of more than one node, by Tarjan's algorithm."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1 or node in graph[node]:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_a_cycle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"e"}}
    assert sorted(cycles(graph)) == [["a", "b", "c"], ["e"]]


def test_the_package_has_no_import_cycle():
    """Counts imports inside functions and under TYPE_CHECKING too."""
    files = module_files()
    graph = {name: imported_modules(path, set(files)) for name, path in files.items()}
    assert "stoa_jax.models.stoa" in graph["stoa_jax.program"]
    assert cycles(graph) == []


HEAVY = (
    *("tensorflow", "tensorflow_datasets", "grain", "clu", "ml_collections", "array_record"),
    *("spacy", "torch", "matplotlib"),
)
LIGHT = (
    *("stoa_jax", "stoa_jax.models.stoa", "stoa_jax.ops", "stoa_jax.objectives"),
    *("stoa_jax.joint_loss", "stoa_jax.program", "stoa_jax.optim", "stoa_jax.sharding"),
    *("stoa_jax.inference.loading", "stoa_jax.inference.export", "stoa_jax.weights"),
    *("stoa_jax.index", "stoa_jax.text", "stoa_jax.convert", "stoa_jax.checkpoint"),
)


@pytest.mark.parametrize("module", LIGHT)
def test_inference_and_the_step_import_nothing_that_only_training_needs(module):
    code = (
        f"import importlib, sys; importlib.import_module({module!r});"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
