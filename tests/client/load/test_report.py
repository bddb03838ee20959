from __future__ import annotations

import json
import math
import os
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.client.load.outcomes import answered, failed, result
from tome_client.load import LoadResult, summarize

pytest.importorskip("matplotlib", reason="needs the report extra")

from tome_client.load.report import page, write_report

RUN = result(
    [
        *(answered(at=number / 50, latency=0.01 + number / 1e4, r=number % 5, right=True) for number in range(400)),
        *(answered(at=number / 50, latency=0.5, budget=0.2, right=False) for number in range(50)),
        *(failed(at=number / 50, reason="INFEASIBLE", right=False) for number in range(20)),
    ]
)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(run: LoadResult) -> Page:
    shown = Page(page(run, summarize(run), "vision:8500"))
    assert shown.open == []
    return shown


def test_the_page_is_whole_and_holds_figures_tables_and_pictures() -> None:
    shown = read(RUN)
    text = " ".join(" ".join(shown.text).split())
    assert shown.seen.count("svg") == 3
    assert "fashion at 47.0 requests/s" in text
    assert f"{summarize(RUN).total.attainment.share:.2%} answered within their budget" in text
    assert "INVALID: " in text
    assert "DEADLINE_EXCEEDED INFEASIBLE 20" in text
    assert "budget 100ms" in text  # In the picture's legend: text stays text.
    assert "vision:8500" in text
    assert "By budget" in text


def test_the_page_refers_to_nothing_elsewhere() -> None:
    written = page(RUN, summarize(RUN), "vision:8500")
    assert not re.findall(r"<(?:script|link|img|iframe)\b", written)
    assert all(target.startswith("#") for target in re.findall(r'(?:href|src)="([^"]*)"', written))


def test_what_comes_from_elsewhere_is_escaped() -> None:
    written = page(RUN, summarize(RUN), "<script>alert(1)</script>")
    assert "<script>" not in written
    assert "&lt;script&gt;" in written


@pytest.mark.parametrize("outcomes", [[], [failed()], [answered()], [answered(at=1.0), failed(at=2.0)]])
def test_few_requests_or_none_make_a_page_too(outcomes: list) -> None:
    assert read(result(outcomes)).seen.count("svg") == (3 if outcomes else 0)


def test_requests_without_a_deadline_have_no_budget_in_any_picture() -> None:
    bulk = [answered(at=number / 50, budget=math.inf) for number in range(50)]
    for outcomes in (bulk, [*bulk, answered(at=0.5), failed(at=0.7)]):
        text = " ".join(" ".join(read(result(outcomes)).text).split())
        assert "no deadline" in text
        assert "Infinity" not in text
        assert "inf " not in text


def test_a_file_whose_name_is_no_text_is_in_the_report_too(tmp_path: Path) -> None:
    named = replace(answered(), image=os.fsdecode(b"latin-\xe9.png"))
    index = write_report(tmp_path, result([named]), summarize(result([named])), "vision:8500")
    assert b"latin-\xe9.png" in (index.parent / "requests.csv").read_bytes()


def test_the_same_run_gives_the_same_page() -> None:
    assert page(RUN, summarize(RUN), "vision:8500") == page(RUN, summarize(RUN), "vision:8500")


def test_a_folder_gets_the_page_the_figures_and_the_requests(tmp_path: Path) -> None:
    index = write_report(tmp_path / "new" / "out", RUN, summarize(RUN), "vision:8500")
    assert index.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert json.loads((index.parent / "report.json").read_text())["summary"]["total"]["sent"] == 470
    assert len((index.parent / "requests.csv").read_text().splitlines()) == 471


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tome_client.load.report")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'tome-serving\[plots\]'"):
        import tome_client.load.report  # noqa: F401
