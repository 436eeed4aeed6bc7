from __future__ import annotations

import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flexcache
from analysis.dataset.tokens import Vocabulary
from analysis.readout import lens
from analysis.report import store_page
from analysis.report.drawing import NUMBERED, heatmap
from analysis.survey import Survey, survey

VOID = {"meta", "br", "img", "link", "input", "hr"}
WORDS = Vocabulary(tuple(f" <w{i}>&" for i in range(300)))


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
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[flexcache.Store, Survey]:
    from tests.corpora import lengths, token_documents
    from tests.models import tiny

    model = tiny("llama")
    documents = token_documents(lengths(40, longest=12), vocabulary=250)
    documents = [{**document, "id": f"<script>{document['id']}"} for document in documents]
    path = tmp_path_factory.mktemp("stores") / "run & <co>.zarr"
    store = flexcache.capture(model, None, documents, path, sites="resid_post", batch_tokens=64, progress=False)
    return store, survey(store, head=lens.Head.of(model), permutations=5, progress=False)


@pytest.fixture(scope="module")
def page(found: tuple[flexcache.Store, Survey], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    return store_page.write(*found, path, words=WORDS, command="flexcache report 'run & <co>.zarr'")


def test_the_page_is_complete_html_without_network_access_and_escapes_texts(page: Path) -> None:
    text = page.read_text("utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert not parser.seen & {"script", "iframe", "link", "img"}
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", text.replace("xlink:href", "href"))
    assert not re.search(r"url\((?!#)", text)
    assert "<co>" not in text
    assert " <w" not in text
    ids = re.findall(r'\bid="(.*?)"', text)
    assert len(ids) == len(set(ids))


def test_the_page_shows_every_part_with_its_results(page: Path, found: tuple[flexcache.Store, Survey]) -> None:
    text = unescape(page.read_text("utf-8"))
    for words in (
        "Norms",
        "Spectra",
        "Similarity of layers",
        "Outliers",
        "Logit lens",
        "Tokens with the largest activations",
    ):
        assert f"<h2>{words}</h2>" in text
    assert text.count("<svg") == 8
    assert "prefers-color-scheme: dark" in text
    assert "40 documents" in text
    cka = float(found[1]["similarity"]["cka"][0, 1])
    assert f"0 and 1: {cka:.3f}" in text
    assert f">{cka:.2f}</text>".replace("0.", ".", 1) in text, "a small heat map shows its numbers"
    assert "Hover over a cell" not in text
    for title in ("CKA of layers", "Canonical correlation of layers", "Norm of a row", "Logit lens by layer"):
        assert f"<figure><b>{title}</b>" in text
    assert 'class="example"' in text
    assert "run & <co>.zarr" in text


def test_a_large_heat_map_has_a_bar_and_numbers_in_tooltips() -> None:
    drawn = heatmap(np.full((NUMBERED + 1, NUMBERED + 1), 0.25), [str(n) for n in range(NUMBERED + 1)], "many")
    assert ">.25</text>" not in drawn
    assert drawn.count("<title>") == (NUMBERED + 1) ** 2
    shades = [int(share) for share in re.findall(r"var\(--one\) (\d+)%", drawn)][-20:]
    assert shades == sorted(shades, reverse=True)
    assert (shades[0], len(set(shades))) == (100, 20)


def test_parts_that_were_not_computed_are_left_out(found: tuple[flexcache.Store, Survey], tmp_path: Path) -> None:
    store, _ = found
    few = survey(store, only=["moments"], by=["layer", "label"], progress=False)
    text = store_page.write(store, few, tmp_path / "r.html").read_text("utf-8")
    assert text.count("<svg") == 1
    assert "Logit lens" not in text
    pooled = survey(store, only=["quantiles", "outliers"], progress=False)
    text = store_page.write(store, pooled, tmp_path / "r.html").read_text("utf-8")
    assert "No massive activation" in text


def test_a_page_about_some_layers_calls_none_of_them_the_last(tmp_path: Path) -> None:
    from tests.corpora import lengths, token_documents
    from tests.models import tiny

    model = tiny("llama")
    documents = token_documents(lengths(40, longest=12), vocabulary=250)
    for layers, words in ([0, 1, 3], "layer 3, the model's last"), ([0, 1], "missing: the store does not have"):
        path = tmp_path / f"{len(layers)}.zarr"
        store = flexcache.capture(model, None, documents, path, layers=layers, batch_tokens=64, progress=False)
        found = survey(store, only=["moments", "lens"], layers=[0, 1], head=lens.Head.of(model), progress=False)
        text = unescape(store_page.write(store, found, tmp_path / "r.html").read_text("utf-8"))
        assert words in text
        assert "norm, layer 0 to 1" in text
        assert ("KL from layer 3" in text) == (3 in layers)
        assert ("half of the predictions stand" in text) == (3 in layers)
        assert "layer 0</b>" not in text
        assert "none of these layers" in text or 3 not in layers


@pytest.mark.parametrize(
    ("site", "rows"), [("model.layers.1.mlp", "all"), ("resid_post", "mean"), ("resid_post", "last")]
)
def test_any_site_and_rows_have_a_page(site: str, rows: str, tmp_path: Path) -> None:
    from tests.corpora import lengths, token_documents
    from tests.models import tiny

    documents = token_documents(lengths(40, longest=12), vocabulary=250)
    path = tmp_path / "s.zarr"
    store = flexcache.capture(
        tiny("llama"), None, documents, path, sites=site, rows=rows, batch_tokens=64, progress=False
    )
    found = survey(store, site, permutations=3, progress=False)
    text = store_page.write(store, found, tmp_path / "r.html", words=WORDS).read_text("utf-8")
    assert "<h2>Spectra</h2>" in text
    assert "nan" not in re.sub(r"<details>.*?</details>", "", text, flags=re.S)


@pytest.mark.parametrize(("family", "counted"), [("llama", True), ("mixtral", False)])
def test_dead_neurons_are_counted_unless_a_column_has_those_of_many_experts(
    family: str, counted: bool, tmp_path: Path
) -> None:
    from tests.corpora import lengths, token_documents
    from tests.models import tiny

    documents = token_documents(lengths(10, longest=12), vocabulary=250)
    path = tmp_path / "s.zarr"
    store = flexcache.capture(tiny(family), None, documents, path, sites="mlp_post", batch_tokens=64, progress=False)
    found = survey(store, "mlp_post", only=["outliers"], progress=False)
    text = store_page.write(store, found, tmp_path / "r.html").read_text("utf-8")
    assert ("are dead" in text) == counted


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page_in_light_and_dark(page: Path, tmp_path: Path, dark: bool) -> None:
    from matplotlib.image import imread

    picture = tmp_path / "page.png"
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1000,1400",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=120)
    pixels = imread(picture)[..., :3]
    corner = pixels[-1, 0]
    assert (corner.mean() < 0.2) == dark
    assert len(np.unique((pixels * 15).astype(int).reshape(-1, 3), axis=0)) > 20
    margin = pixels[:, -8:]
    assert np.ptp(margin, axis=(0, 1)).max() < 0.02, "something runs over the right edge"
