"""The pages for contributors name files and code that exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATH = re.compile(r"[`(]([\w.-]+(?:/[\w.-]+)*(?:/|\.py|\.md|/\w+))[`)]")
NAME = re.compile(r"`([a-z_]+(?:\.\w+)+)[`(]")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md"])
def test_every_file_that_is_named_exists(page: str) -> None:
    paths = PATH.findall((ROOT / page).read_text(encoding="utf-8"))
    assert paths
    short = ("", page.rpartition("/")[0], "flexcache")
    assert not [path for path in paths if not any((ROOT / folder / path).exists() for folder in short)]


def found(name: str) -> bool:
    """Return True for the name of a module or of something in one, seen from flexcache or analysis."""
    for package in ("flexcache", "analysis"):
        value = importlib.import_module(package)
        try:
            for part in name.split("."):
                inner = f"{getattr(value, '__name__', '')}.{part}"
                value = getattr(value, part) if hasattr(value, part) else importlib.import_module(inner)
        except ModuleNotFoundError:
            continue
        return True
    return False


def test_every_name_in_the_walks_through_the_code_exists() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    walks = page.partition("## Three walks")[2].partition("\n## ")[0]
    names = [name for name in NAME.findall(walks) if not name.endswith(".parquet")]
    assert len(names) > 15
    assert not [name for name in names if not found(name)]
