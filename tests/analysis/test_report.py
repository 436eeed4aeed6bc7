from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest

from analysis import probes, report

EVIL = r"<script>alert('label & co')</script> $\q$"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Balanced(HTMLParser):
    """Parser that fails on a tag that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(real_store: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    sweep = probes.sweep(real_store, EVIL, "resid_post", resamples=20, progress=False)
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    assert report.write(real_store, sweep, path, command=f"flexcache probe '{EVIL}'") == path
    return path.read_text("utf-8")


def test_everything_from_data_is_escaped(page: str) -> None:
    assert "<script" not in page
    assert "<b>pos" not in page
    assert "<co>" not in page
    assert EVIL in unescape(page)
    assert "<b>pos</b> $x" in unescape(page)


def test_the_page_needs_no_network(page: str) -> None:
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", page.replace("xlink:href", "href"))
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page


def test_the_page_is_complete_html_with_a_chart_for_each_metric(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert page.count("<svg") == 4, "accuracy, AUROC, calibration, confusion"
    ids = re.findall(r'\bid="(.*?)"', page)
    assert len(ids) == len(set(ids))
    assert {f'id="{target}"' for target in re.findall(r"(?:url\(|href=\")#(.*?)[\")]", page)} <= set(
        re.findall(r'\bid=".*?"', page)
    )
    assert not parser.seen & {"script", "iframe", "link", "img"}


def test_the_curves_use_the_colours_of_the_page(page: str) -> None:
    for drawn in re.findall(r"<svg.*?</svg>", page, re.S):
        assert "var(--probe)" in drawn
        assert "var(--ink)" in drawn
        colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawn))
        assert colours == set()
    assert "prefers-color-scheme: dark" in page


def test_the_page_describes_capture_settings_and_results(real_store: Any, page: str) -> None:
    sweep = probes.sweep(real_store, EVIL, "resid_post", resamples=20, progress=False)
    text = unescape(page)
    accuracy = sweep.results["pooled"].sel(arm="probe", metric="accuracy", layer=2)
    assert f"{float(accuracy):.3f}".lstrip("0") in text or "1.00" in text
    for words in ("layers 0, 2", "60 documents", "StratifiedKFold", "Logistic(C=0.01", "a second", "Majority class"):
        assert words in text
    compile(re.search(r"import flexcache\n.*?sweep\.best", text, re.S)[0], "snippet", "exec")  # type: ignore[index]


def test_cards_of_layers_name_the_layer_and_sentences_have_spaces(real_store: Any, tmp_path: Any) -> None:
    sweep = probes.sweep(real_store, EVIL, "resid_post", baselines=["majority", "random"], resamples=20, progress=False)
    text = report.write(real_store, sweep, tmp_path / "r.html").read_text("utf-8")
    cards = dict(re.findall(r"<span>([^<]*)</span><b>[^<]*</b><span>([^<]*)</span>", text))
    assert cards["random direction"].endswith(f"· layer {sweep.best.layer}")
    assert "layer" not in cards["majority class"]
    assert "All rows of a document are in the same fold. The probe" in " ".join(text.split())
    prose = re.sub(r"<(style|svg|pre)\b.*?</\1>", "", text, flags=re.DOTALL)
    assert not re.findall(r"[a-z]\.[A-Z]\w+ ", prose)
    assert "Scroll sideways for all columns" in text


def test_the_snippet_repeats_the_sweep(real_store: Any) -> None:
    from analysis.report import facts

    sweep = probes.sweep(real_store, EVIL, "resid_post", probes.Ridge(7.0), rows="mean", cv=3, progress=False)
    names: dict[str, Any] = {}
    exec(facts.snippet(sweep, str(real_store.path)), names)
    assert names["sweep"].results.identical(sweep.results)


def test_a_sweep_of_one_layer_and_a_regression_has_a_page(make_store: Any, real_store: Any, tmp_path: Any) -> None:
    sweep = probes.sweep(make_store(), "score", "resid_post", probes.Ridge(), layers=1, resamples=20, progress=False)
    text = report.write(real_store, sweep, tmp_path / "r.html", title="Mine").read_text("utf-8")
    assert "<h1>Mine</h1>" in text
    assert "Mean of the target" in text
    assert "There was only one layer" in text
