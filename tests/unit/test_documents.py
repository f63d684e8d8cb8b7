"""What the documents say is there: files, links, modules, and the figures that the README gives."""

import ast
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from fourfold.launch.cli import app
from fourfold.layouts.inputs.layout import PRECISIONS, SCHEDULES
from fourfold.layouts.inputs.layout_words import _FLAGS, _NUMBERS
from fourfold.parallel.pipeline.mitigation import _WORDS
from fourfold.parallel.pipeline.schedule import NAMES, PipelineSchedule
from fourfold.parallel.stream.patching import PATCHES
from fourfold.parallel.testing.tiny_models import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
READMES = sorted((ROOT / "benchmarks").glob("*/README.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("parallel", "layouts", "launch", "profiling", "tests", "benchmarks", "examples", "docs")


@pytest.mark.parametrize("document", [*DOCUMENTS, *READMES], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(document):
    text = document.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    missing = [link for link in links if not (document.parent / link).exists()]
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text)
    missing += [path for path in paths if not (ROOT / path).exists()]
    modules = re.findall(r"-m ((?:fourfold|benchmarks)[\w.]+)", text)
    folders = [ROOT.joinpath(*module.removeprefix("fourfold.").split(".")) for module in modules]
    missing += [str(path) for path in folders if not path.with_suffix(".py").exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_that_python_code_imports_exist(document):
    """Of every ```python block; the README's blocks are run, too (tests/ranks/launch/test_readme.py)."""
    for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL):
        imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
        code = "\n".join(ast.unparse(node) for node in imports)
        exec(compile(code, str(document), "exec"), {})


@cache
def words_of_the_code() -> set[str]:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".csv")]
    return set(re.findall(r"\w+", "\n".join(path.read_text() for path in [*files, ROOT / "pyproject.toml"])))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_in_the_text_are_in_the_code(document):
    """`like_this`, `LikeThis`, `LIKE_THIS` and `like_this(...)`: renamed in the code, they are to be renamed here."""
    if document.name == "CHANGELOG.md":  # which tells of names that are gone
        return
    told = re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", document.read_text())
    names = {
        name.rpartition(".")[2] for name in told if re.search(r"[_A-Z]", name) and not name.endswith((".md", ".py"))
    }
    assert names - words_of_the_code() - {"MFU", "P"} == set()


def test_the_architecture_shows_every_patch():
    rows = [f"| {patch.what} | {patch.lasts} | {patch.why} |" for patch in PATCHES]
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert [row for row in rows if row not in text] == []
    assert len(re.findall(r"^\| .* \| (?:enabled|call|read) \| ", text, re.MULTILINE)) == len(rows)


def test_the_pipeline_guide_names_every_schedule_and_mitigation():
    text = (ROOT / "docs" / "pipeline.md").read_text()
    assert [name for name in (*NAMES, *_WORDS) if name != "none" and f"`{name}`" not in text] == []


def test_the_table_of_families_has_every_tested_one_and_no_difference():
    text = (ROOT / "docs" / "families.md").read_text()
    assert [family for family in FAMILIES if f"\n| {family} |" not in text] == []
    assert "differs" not in text


def test_the_drawn_schedules_are_what_the_code_draws():
    text = (ROOT / "docs" / "pipeline.md").read_text()
    shown = re.findall(r'named\("([\w:]+)", (\d)\)\.program\((\d)\)\.drawn\(\)`.*?```\n(.*?)\n```', text, re.DOTALL)
    assert len(shown) == 2
    for name, num_stages, count, drawing in shown:
        assert PipelineSchedule.named(name, int(num_stages)).program(int(count)).drawn() == drawing


def test_the_legend_has_every_word_of_a_layouts_name():
    legend = (ROOT / "README.md").read_text().split("How to read a layout's name")[1].split("## ")[0]
    told = re.findall(r"`([\w+/-]+)`", legend)
    shown = {*told, *(re.sub(r"\d.*", "", word) for word in told)}  # mb of `mb2`
    words = {*_NUMBERS, *_FLAGS, *PRECISIONS[1:], *SCHEDULES[1:], "full", "streamx", "less"}
    assert words - shown == set()


def test_the_readme_names_every_command():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    (sentence,) = re.findall(r"`layout-advisor` has (.*?);", (ROOT / "README.md").read_text())
    assert set(re.findall(r"`([\w-]+)`", sentence)) == names


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w])", text)]


def figures_and_commands() -> list[tuple[str, str]]:
    """(bold figure, command beside it) of the README's table."""
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if "`python -m benchmarks.rows" in line]
    return [
        (figure, re.findall(r"`(python -m benchmarks.rows .*?)`", row)[0])
        for row in rows
        for figure in re.findall(r"\*\*([\d.%]+)\*\*", row)
    ]


def test_each_system_has_a_figure():
    commands = " ".join(command for _, command in figures_and_commands())
    for benchmark in ("ring_attention", "stream_backprop", "pipelined_backprop", "layout_search"):
        assert benchmark in commands


@pytest.mark.parametrize(("figure", "command"), figures_and_commands())
def test_the_command_prints_the_figure(figure, command):
    words = [sys.executable, *shlex.split(command)[1:]]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    digits, percent = figure.rstrip("%"), figure.endswith("%")
    decimals = len(digits.partition(".")[2])
    printed = {f"{number * (100 if percent else 1):.{decimals}f}" for number in numbers(result.stdout)}
    assert digits in printed, result.stdout
