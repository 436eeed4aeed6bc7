"""Pages from the templates beside this file: what stems from data is escaped, a name that is missing is an error."""

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
    """Fill a template, write it, and return where; folders are made."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(source(template)).render(**values)
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page + "\n", "utf-8")
    return path
