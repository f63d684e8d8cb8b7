"""The rules of the house that import-linter and ruff do not see; docs/architecture.md gives the reasons."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ("parallel", "layouts", "launch", "profiling")
TESTS = ("tests",)


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def modules(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """(path below the root, syntax tree) of every file of the folders."""
    for path in python_files(*folders):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def called_name(call: ast.Call) -> str:
    """`import_module` for `importlib.import_module(...)`."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def test_files_are_under_400_lines():
    folders = (*SOURCE, *TESTS, "benchmarks", "examples")
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files(*folders)}
    assert {path: lines for path, lines in lengths.items() if lines >= 400} == {}


def test_files_of_tests_have_names_of_their_own():
    """pytest imports a test file by its name alone: of two with one name it would take one for the other."""
    names = [path.name for path in python_files(*TESTS) if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


def test_no_module_is_named_by_a_string():
    """Only the lazy table of exported names imports what a string says."""
    found = [
        f"{path}:{node.lineno}"
        for path, tree in modules(*SOURCE)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and called_name(node) in ("import_module", "__import__")
        and path != "parallel/lazy.py"
    ]
    assert found == []


def test_tests_import_no_benchmark_and_no_other_test():
    """What several tests share is in tests/support, what benchmarks share as well in parallel/testing."""
    found = []
    for path, tree in modules(*TESTS):
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                parts = name.split(".")
                if parts[0] in ("benchmarks", "tests", "conftest") or parts[-1].startswith("test_"):
                    found.append(f"{path} imports {name}")
    assert found == []


def test_exceptions_to_seven_parameters_are_needed():
    """A file that ruff is told to spare still has a function with more than 7 parameters."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    spared = {path for path, rules in settings["per-file-ignores"].items() if "PLR0913" in rules}
    arguments = ("check", "--isolated", "--select", "PLR0913", "--config", "lint.pylint.max-args=7")
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "--output-format", "concise", *SOURCE, "benchmarks", "tests"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    needed = {line.split(":")[0] for line in result.stdout.splitlines() if "PLR0913" in line}
    assert needed == spared


def patched(target: ast.expr) -> bool:
    """Whether an assignment to this replaces a method or the class of an object: x.forward, x.__dict__["forward"]."""
    if isinstance(target, ast.Attribute):
        return target.attr in ("forward", "__class__")
    return (
        isinstance(target, ast.Subscript)
        and isinstance(target.value, ast.Attribute)
        and target.value.attr == "__dict__"
        and ast.unparse(target.slice) == "'forward'"
    )


def test_modules_are_patched_in_one_place():
    """What StreamBP changes in a model stands in the table of stream/patching; nobody else changes one."""
    found = []
    for path, tree in modules("parallel", "launch"):
        if path.startswith("parallel/testing/") or path == "parallel/stream/patching.py":
            continue
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            replaces = isinstance(node, ast.Call) and called_name(node) == "setattr"
            if replaces or any(patched(target) for target in targets):
                found.append(f"{path}:{node.lineno}")
    assert found == []


# What a limit relates: fields of a layout, and facts of a decoder.
FACTS = re.compile(
    r"\b(pp|cp|tp|vp|ep|zero_stage|checkpointing|schedule|tie_word_embeddings|attention_dropout|sliding_window|rope_type)="
)


def test_what_the_runtime_can_run_is_said_in_one_place():
    """A refusal that relates two of FACTS is a limit of the runtime; all of those stand in decoder/limits."""
    found = []
    for path, tree in modules("parallel/decoder", "layouts/search", "layouts/inputs", "launch"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and node.exc is not None and path != "parallel/decoder/limits.py":
                facts = set(FACTS.findall(ast.unparse(node.exc)))
                found += [f"{path}:{node.lineno} {sorted(facts)}"] * (len(facts) > 1)
    assert found == []
