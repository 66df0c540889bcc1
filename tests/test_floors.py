"""The package has floors: a file imports only from lower ones, or from its own folder."""

import ast
from functools import cache
from pathlib import Path

import pytest

import budwood

ROOT = Path(budwood.__file__).parent
FLOORS = {
    "errors": -2,
    "humanize": -1,
    "progress": -1,
    "timing": -1,
    "demo_assets": 0,
    "sparsity": 0,
    "formats": 1,
    "kernels": 2,
    "models": 2,
    "environment": 3,
    "checkpoints": 3,
    "stream": 4,
    "data": 4,
    "training": 5,
    "supernet": 5,
    "reports": 5,
    "runs": 6,
    "pages": 6,
    "methods": 7,
    "evaluation": 7,
    "pruning": 8,
    "benchmarking": 8,
    "repacking": 8,
    "retraining": 8,
    "finetuning": 8,
    "planning": 8,
    "inspection": 8,
    "conversion": 8,
    "comparison": 9,
    "cli": 10,
    "__main__": 11,
}
# These run wherever budwood or torch is imported, so they import nothing heavy at module level.
LIGHT = ("__init__", "autoload")
HEAVY = {"torch", "transformers", "safetensors", "accelerate", "huggingface_hub", "numpy"}
PLACES = {
    "transformers": {"benchmarking", "models", "checkpoints", "stream", "evaluation", "autoload"},
    "safetensors": {"checkpoints"},
    "lm_eval": {"evaluation"},
}
FILES = sorted(ROOT.rglob("*.py"))


def top_level(file: Path) -> str:
    """The folder or top-level file of the package that `file` belongs to."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def names(node: ast.AST, file: Path) -> list[str]:
    """The modules that an import statement names, in full; nothing for other nodes."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = ("budwood", *file.relative_to(ROOT).parent.parts)
    base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
    module = ".".join(part for part in (base, node.module or "") if part)
    return sorted({f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}") else module for alias in node.names})


def is_module(name: str) -> bool:
    """Whether `name` is the package or a folder or file of it."""
    first, *rest = name.split(".")
    place = ROOT.joinpath(*rest)
    return first == "budwood" and (place.is_dir() or place.with_suffix(".py").is_file())


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
def imports(file: Path) -> list[str]:
    return [name for node in ast.walk(parsed(file)) for name in names(node, file)]


def while_importing(nodes: list[ast.stmt]) -> list[ast.stmt]:
    """The statements that run when a file is imported: no bodies of functions, nothing for type checkers."""
    running = []
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            running += while_importing(node.orelse)
            continue
        running.append(node)
        for inner in ("body", "orelse", "finalbody"):
            running += while_importing(getattr(node, inner, []))
        for handler in getattr(node, "handlers", []):
            running += while_importing(handler.body)
    return running


def own(file: Path) -> list[str]:
    """The top-level folders and files of the package that `file` imports from, its own included."""
    return [name.split(".")[1] for name in imports(file) if name.startswith("budwood.")]


def test_a_file_imports_from_lower_floors_only():
    for file in FILES:
        if top_level(file) in LIGHT:
            continue
        here = top_level(file)
        assert here in FLOORS, f"{here} has no floor; add it to FLOORS"
        for there in own(file):
            # Public names (`import budwood` inside a verb) are the package itself.
            if there == here or (here in ("cli", "__main__") and there not in FLOORS):
                continue
            assert there in FLOORS, f"{file} imports {there}, which has no floor"
            assert FLOORS[there] < FLOORS[here], f"{file} ({here}, {FLOORS[here]}) imports {there} ({FLOORS[there]})"


def test_third_party_packages_are_imported_only_where_listed():
    for file in FILES:
        for name in imports(file):
            party = name.split(".")[0]
            assert top_level(file) in PLACES.get(party, {top_level(file)}), f"{file} imports {party}"


def test_only_the_command_line_uses_the_public_names():
    for file in FILES:
        if top_level(file) in ("cli", "__main__", *LIGHT):
            continue
        for node in ast.walk(parsed(file)):
            taken = [alias.name for alias in node.names] if "budwood" in names(node, file) else ["__version__"]
            assert taken == ["__version__"], f"{file} imports {', '.join(taken)} from the package it is part of"


@pytest.mark.parametrize("name", LIGHT)
def test_import_budwood_imports_nothing_heavy(name):
    for node in while_importing(ast.parse((ROOT / f"{name}.py").read_text()).body):
        for imported in names(node, ROOT / f"{name}.py"):
            assert imported.split(".")[0] not in HEAVY, f"{name} imports {imported}"
            assert not imported.startswith("budwood") or imported == "budwood.autoload", f"{name} imports {imported}"


@pytest.mark.parametrize("file", [file for file in FILES if top_level(file) == "cli"], ids=lambda file: file.stem)
def test_the_command_line_starts_without_torch(file):
    for node in while_importing(parsed(file).body):
        for imported in names(node, file):
            assert imported.split(".")[0] not in HEAVY, f"{file} imports {imported} before a verb needs it"
            if imported.startswith("budwood."):
                assert imported.split(".")[1] in ("cli", "errors", "humanize", "progress"), (
                    f"{file} imports {imported} too early"
                )


def test_there_are_no_circular_imports():
    """Every import statement counts, those inside functions and for type checkers too."""
    assert circular_import({name: set(imports(file)) for name, file in modules().items()}) is None


@pytest.mark.parametrize(
    ("edges", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, None),
        ({"a": {"b", "c"}, "b": {"c"}, "c": {"os"}}, None),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
    ],
)
def test_a_circular_import_is_found(edges, found):
    assert circular_import(edges) == found


def test_imports_inside_functions_and_for_type_checkers_are_read():
    lines = [
        "from typing import TYPE_CHECKING",
        "if TYPE_CHECKING:",
        "    from budwood.stream.block import Block",
        "def late():",
        "    from budwood.runs import run",
        "class Kept:",
        "    import budwood.errors",
    ]
    file = ROOT / "methods" / "never_written.py"
    tree = ast.parse("\n".join(lines))
    found = {name for node in ast.walk(tree) for name in names(node, file)}
    assert found == {"typing", "budwood.stream.block", "budwood.runs.run", "budwood.errors"}


def modules() -> dict[str, Path]:
    """Every file of the package by the name that imports it."""
    dotted = {".".join(("budwood", *file.relative_to(ROOT).with_suffix("").parts)): file for file in FILES}
    return {name.removesuffix(".__init__"): file for name, file in dotted.items()}


def circular_import(edges: dict[str, set[str]]) -> list[str] | None:
    """A chain of imports that ends where it began; None where there is none."""
    done: set[str] = set()

    def visit(name: str, chain: list[str]) -> list[str] | None:
        if name in chain:
            return [*chain[chain.index(name) :], name]
        if name in done:
            return None
        for further in sorted(edges[name] & set(edges) - {name}):
            if found := visit(further, [*chain, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(edges) if (found := visit(name, []))), None)
