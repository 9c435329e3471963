"""What the documents say runs: each Python block of the README and the guide is executed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(file: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_readme_s_twenty_lines_train_and_sample():
    """In a process of its own, as a reader would. The samples end near the exact ones: 0.1 is a mode's own width."""
    (program,) = blocks("README.md")
    assert len([line for line in program.splitlines() if line.strip()]) <= 20
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    distance = float(done.stdout.strip().rsplit(" ", 1)[1])
    assert distance < 0.1


@pytest.mark.parametrize("program", blocks("docs/guide.md"), ids=lambda p: p.splitlines()[0])
def test_the_guide_s_programs_run(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where they write files
    exec(compile(program, "docs/guide.md", "exec"), {"__name__": "guide"})


def test_the_solver_of_the_page_on_solvers_runs():
    (program,) = blocks("docs/solvers.md")
    exec(compile(program, "docs/solvers.md", "exec"), {"__name__": "solvers"})


@pytest.mark.parametrize("file", ["README.md", "docs/guide.md", "docs/solvers.md", "docs/book_map.md"])
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / file).read_text(encoding="utf-8")):
        assert ((ROOT / file).parent / target).exists(), target


def test_the_book_map_names_things_that_exist():
    import undiffuse as ud

    text = (ROOT / "docs/book_map.md").read_text(encoding="utf-8")
    for name in re.findall(r"`ud\.([A-Za-z_.0-9]+)", text):
        thing = ud
        for part in name.split("."):
            thing = getattr(thing, part)
    for file, test in re.findall(r"`([a-z_0-9/]+\.py)::(\w+)`", text):
        assert f"def {test}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), (file, test)


def test_importing_is_light():
    """`import undiffuse` loads torch, numpy and jaxtyping, and no heavy package of any room."""
    program = (
        "import sys, undiffuse; heavy = {'sklearn', 'matplotlib', 'PIL', 'datasets', 'pydantic', 'yaml', 'typer', "
        "'rich', 'scipy', 'pandas'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
