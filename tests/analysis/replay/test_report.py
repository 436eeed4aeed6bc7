from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from analysis import replay
from analysis.report import replayed
from tests.corpora import token_documents
from tests.models import VOCABULARY

EVIL = "<script>alert('x & y')</script>"


@pytest.fixture
def swept(captured: Callable[..., Any]) -> tuple[Any, replay.Sweep]:
    documents = [
        {**document, "id": f"{EVIL}{n}"} for n, document in enumerate(token_documents([5] * 6, vocabulary=VOCABULARY))
    ]
    store, model = captured(documents=documents)
    sweep = replay.sweep(
        store,
        model,
        replay.grid(layers=[1, 3], positions={EVIL: {documents[0]["id"]: [1, 2], documents[1]["id"]: [0]}}),
        replay.Zero() | replay.Patch(documents[2]["id"]),
        ["kl", "flips"],
        ["identity", "norm_matched"],
        progress=False,
    )
    return store, sweep


def test_the_page_loads_nothing_and_escapes_all_data(swept: Any, tmp_path: Path) -> None:
    store, sweep = swept
    page = replayed.write(store, sweep, tmp_path / "deep/report.html", command=f"flexcache replay {EVIL}").read_text()
    HTMLParser().feed(page)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", "")
    assert page.count('<svg role="img"') == 2
    assert page.count('<p class="legend">') == 2
    assert "a replay without changes equals the forward, bit for bit" in page


def test_the_table_shows_the_effects(swept: Any, tmp_path: Path) -> None:
    store, sweep = swept
    page = replayed.write(store, sweep, tmp_path / "report.html").read_text()
    effect = sweep.effect(store)
    for edit in ("Zero", "Patch"):
        value = float(
            effect["mean"]
            .sel(arm="edit", metric="kl", layer=3, edit=next(e for e in effect["edit"].values if e.startswith(edit)))
            .squeeze()
        )
        assert f"<td>{value:.4g}</td>" in page
