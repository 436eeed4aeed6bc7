"""Remedies of errors in the words of configuration files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

from flexcache.errors import FlexCacheError
from flexcache.validation import Options

VALUE = r"""\[[^]]*\]|\([^()]*\)|'[^']*'|"[^"]*"|[^\s,;)]+"""
ARGUMENT = re.compile(rf"(?<!--set )\b([a-z_]+)=({VALUE})")
DOCUMENTS = re.compile(rf"flexcache\.open_documents\(…((?:, [a-z_]+=(?:{VALUE}))*)\)")
CONSTANTS = {"None": "null", "True": "true", "False": "false"}


@contextmanager
def yaml_remedies(file: Literal["capture", "replay"]) -> Iterator[None]:
    """Rewrite the remedy of an error that leaves this context for a user whose arguments come from a file.

    ::

        @yaml_remedies("replay")
        def replay(store, config): ...
    """
    try:
        yield
    except FlexCacheError as error:
        error.remedy = error.remedy and as_yaml(error.remedy, key_paths(file))
        raise


def as_yaml(text: str, paths: Mapping[str, str]) -> str:
    """Return a text with Python arguments as keys of a file, if the file has such keys.

    >>> as_yaml("give answers=(token, other), or positions='last'", {"answers": "answers", "positions": "at.positions"})
    "give answers: [token, other], or at: {positions: 'last'}"
    >>> as_yaml("leave it out by flexcache.open_documents(…, text=None, labels=['a'])", {})
    "leave it out by documents: {text: null, labels: ['a']}"

    Parameters
    ----------
    paths
        By name, the path of a key in the file.
    """

    def of_documents(found: re.Match[str]) -> str:
        inside = ", ".join(f"{name}: {_yaml_value(value)}" for name, value in ARGUMENT.findall(found[1]))
        return f"documents: {{{inside}}}"

    def of_argument(found: re.Match[str]) -> str:
        *parents, name = paths.get(found[1], "").split(".")
        written = f"{name}: {_yaml_value(found[2])}"
        return f"{parents[0]}: {{{written}}}" if parents else written if name else found[0]

    return ARGUMENT.sub(of_argument, DOCUMENTS.sub(of_documents, text))


def key_paths(file: Literal["capture", "replay"]) -> dict[str, str]:
    """Return the path of each key of a file by its name; of two with one name, that of the outer one.

    >>> key_paths("replay")["positions"]
    'at.positions'
    """
    from pipelines.config.capture_config import CaptureConfig
    from pipelines.config.replay_config import ReplayConfig

    model: type[Options] = CaptureConfig if file == "capture" else ReplayConfig
    inner = {
        key: f"{name}.{key}"
        for name in model.names()
        for section in _sections(model.model_fields[name].annotation)
        for key in section.names()
    }
    return inner | {name: name for name in model.names()}


def _sections(annotation: Any) -> list[type[Options]]:
    """Return the options in an annotation, such as a union with None."""
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _yaml_value(text: str) -> str:
    if text.startswith("("):
        return f"[{text[1:-1].rstrip(',')}]"
    return CONSTANTS.get(text, text)
