"""YAML files of keys and values, with changes from the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flexcache.errors import ConfigError
from flexcache.paths import local_path


def read_yaml(path: Path, changes: Sequence[str], example: str) -> dict[str, Any]:
    """Return the content of a file, with changes such as ``batch_tokens=2048`` or ``model.dtype=float32``.

    Parameters
    ----------
    example
        A line of such a file, for the error if it is not a mapping.

    Raises
    ------
    ConfigError
        The file or a change cannot be read.
    """
    try:
        data = yaml.safe_load(local_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"configuration {path} cannot be read", found=error.strerror, remedy="check the path"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} is not YAML", found=" ".join(str(error).split())) from error
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"configuration {path} is not a mapping", expected=f"lines such as  {example}", found=repr(data)[:80]
        )
    content = dict(data)
    for change in changes:
        _apply_change(content, change)
    return content


def _apply_change(content: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise ConfigError(f"change {change!r} cannot be read", expected="key=value, for example batch_tokens=2048")
    *parents, last = key.split(".")
    section = content
    for name in parents:
        inner = section.get(name, {})
        if isinstance(inner, str | list):  # the short form of model or documents
            inner = {"name" if name == "model" else "path": inner}
        section[name] = dict(inner)
        section = section[name]
    section[last] = yaml.safe_load(text)
