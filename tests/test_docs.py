"""The Python that README.md and docs/ print runs as it is printed, and every link leads somewhere."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server_process import ServerProcess

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
# Runs snippets given as JSON, so that a traceback names the page and its line. In a process of its own, since Triton's
# client and our own messages can't be loaded into one.
RUN = """
import json, sys
names = {"__name__": "__main__"}
for line, code in json.load(sys.stdin):
    exec(compile("\\n" * (line - 1) + code, sys.argv[1], "exec"), names)
"""
# Of a load test, which takes as long as it says.
SHORTER = {"duration=10,": "duration=1,", "warmup=2,": "warmup=0,"}


def prose(page: Path) -> str:
    """Return a page without its blocks of code, in which `#` and brackets mean other things."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page, one for each heading."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def snippets(page: Path) -> list[tuple[int, str]]:
    """The blocks of Python on a page, each with the line that it begins on."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: block.start(1)].count("\n") + 1, block[1]) for block in found]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_a_pages_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_readme_or_another_page_links_to_every_page() -> None:
    linked = {
        (page.parent / link).resolve()
        for page in LINKING
        for link in re.findall(r"\]\(([^)#\s]+\.md)[#)]", prose(page))
    }
    assert linked >= set(PAGES)


def test_there_are_snippets() -> None:
    assert sum(len(snippets(page)) for page in PAGES) >= 8


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_a_pages_python_runs(page: Path, server: ServerProcess, samples: dict[Path, str], tmp_path: Path) -> None:
    """Those of one page run one after the other, as its reader would type them; files are where the page has them."""
    for folder in ("server", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for sample in samples:
        (tmp_path / sample.name).symlink_to(sample)
    (tmp_path / "cloth.jpg").symlink_to(next(iter(samples)))
    given = []
    for line, code in snippets(page):
        for printed, meant in {"localhost:8500": server.target, **SHORTER}.items():
            code = code.replace(printed, meant)
        given.append((line, code))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(page)], cwd=tmp_path, input=json.dumps(given), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
