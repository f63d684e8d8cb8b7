"""Imports run one way, and the planner does without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": "src"}, capture_output=True, text=True, timeout=120)


def test_import_directions():
    """launch -> layouts -> parallel | profiling, as pyproject.toml has it for import-linter."""
    result = run(sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 kept, 0 broken" in result.stdout


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


def test_every_exported_name_exists():
    import fourfold.parallel

    for name in fourfold.parallel.__all__:
        assert getattr(fourfold.parallel, name).__name__ == name
