"""Fill the page templates of this folder; texts from data are escaped, and a missing name is an error."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from flexcache.paths import local_path


def source(template: str) -> str:
    """Return the text of a template."""
    return files(__package__).joinpath(template).read_text("utf-8")


def write_page(template: str, path: str | Path, **values: Any) -> Path:
    """Fill a template, write the page with its folders, and return its path."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(source(template)).render(**values)
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page + "\n", "utf-8")
    return path
