"""The examples in docstrings run as they are printed."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import analysis
import flexcache
import pipelines

MODULES = [
    module.name
    for package in (flexcache, analysis, pipelines)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if ">>> " in Path(importlib.util.find_spec(module.name).origin or "").read_text(encoding="utf-8")  # type: ignore[union-attr]
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_their_output(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert tried
    assert not failed
