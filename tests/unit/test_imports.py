"""Imports run one way, and the planner does without torch."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": "src"}, capture_output=True, text=True, timeout=120)


def test_import_directions():
    """The contracts that pyproject.toml has for import-linter."""
    result = run(sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 kept, 0 broken" in result.stdout


def test_layouts_and_the_command_line_need_no_torch():
    files = [path for path in (ROOT / "layouts").rglob("*.py") if path.stem != "__init__"]
    modules = [".".join(("fourfold", *path.relative_to(ROOT).with_suffix("").parts)) for path in files]
    assert len(modules) > 10
    code = f"import sys, {', '.join(sorted(modules))}, fourfold.launch.cli; sys.exit('torch' in sys.modules)"
    assert run(sys.executable, "-c", code).returncode == 0


@pytest.mark.parametrize("folder", ["parallel", "layouts", "launch"])
def test_a_second_copy_is_refused(folder):
    """From the repository's root `import parallel` finds the folder; its classes would be others than fourfold's."""
    result = run(sys.executable, "-c", f"import {folder}")
    assert result.returncode != 0
    assert f"import fourfold.{folder}, not '{folder}'" in result.stderr


def test_a_second_copy_of_profiling_is_refused_by_each_module():
    """The folder has no __init__.py that could: the standard library has a package of its name (PEP 799)."""
    assert not (ROOT / "profiling" / "__init__.py").exists()
    names = sorted(path.stem for path in (ROOT / "profiling").glob("*.py"))
    assert {"session", "run", "memory", "clock"} < set(names)
    code = f"""
from importlib import import_module
for name in {names}:
    try:
        import_module(f"profiling.{{name}}")
        print(name, "was imported")
    except ImportError as error:
        print(name, error)
"""
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    refusal = "import fourfold.profiling, not 'profiling': a second copy would make second classes"
    assert result.stdout.splitlines() == [f"{name} {refusal}" for name in names]


PACKAGES = ["parallel", *(f"parallel/{name}" for name in ("sequence", "ring", "stream", "pipeline", "decoder"))]


@pytest.mark.parametrize("folder", PACKAGES)
def test_a_package_offers_what_it_lists(folder):
    """The lazy table, the imports that type checkers read, and the modules themselves agree."""
    name = "fourfold." + folder.replace("/", ".")
    package = import_module(name)
    tree = ast.parse((ROOT / folder / "__init__.py").read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [(line.module, alias.name) for line in typed.body for alias in line.names]
    assert sorted(exported for _, exported in imports) == package.__all__ == dir(package)
    for module, exported in imports:
        assert getattr(package, exported) is getattr(import_module(module), exported)
    with pytest.raises(AttributeError, match=f"{name} has no 'nothing'"):
        package.nothing  # noqa: B018
