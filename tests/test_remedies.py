"""What errors advise exists: every argument, option and command that a remedy names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import flexcache
from pipelines.cli import app
from pipelines.config.yaml_remedies import CALL, as_yaml, key_names

ROOT = Path(__file__).parents[1]
PACKAGES = ("flexcache", "analysis", "pipelines")
SOURCES = {path: ast.parse(path.read_text("utf-8")) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
FOREIGN = {"enforce_eager", "tie_word_embeddings", "attn_implementation", "sep", "batched", "add_special_tokens"} | {
    "multiprocessing_context"
}
"""Arguments of other libraries."""


def texts(node: ast.expr) -> str:
    """Return the text of an expression, whichever way its conditions go; what is filled in is a star."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join("*" if isinstance(part, ast.FormattedValue) else texts(part) for part in node.values)
    return " ".join(texts(part) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr))


def remedies() -> Iterator[tuple[str, str]]:
    """Yield where each remedy is, and its text."""
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            by_name = isinstance(node, ast.keyword) and node.arg in ("remedy", "advice")
            by_variable = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "remedy"
            found: Any = getattr(node, "value", None) if by_name or by_variable else None
            if found is not None and texts(found).strip():
                yield f"{path.relative_to(ROOT)}:{found.lineno}", texts(found)


def parameters() -> set[str]:
    """Return the parameters of functions and the fields of classes that a user can call."""
    names: set[str] = set()
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
                names |= {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                names |= {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}  # type: ignore[union-attr]
    return names


def test_remedies_name_arguments_options_and_commands_that_exist() -> None:
    command = typer.main.get_command(app)
    commands = command.commands  # type: ignore[attr-defined]
    options = {option for one in commands.values() for parameter in one.params for option in parameter.opts}
    options |= {"--nproc-per-node"}  # of torchrun
    known = parameters() | FOREIGN
    found = list(remedies())
    wrong = []
    for where, text in found:
        wrong += [f"{where}: {name}=" for name in re.findall(r"\b([a-z_]+)=(?!=)", text) if name not in known]
        wrong += [f"{where}: {name}" for name in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text) if name not in options]
        wrong += [
            f"{where}: flexcache {name}"
            for name in re.findall(r"\bflexcache ([a-z]+(?:-[a-z]+)*)", text)
            if name not in commands
        ]
        wrong += [
            f"{where}: flexcache.{name}"
            for name in re.findall(r"\bflexcache\.([a-z_]+)", text, re.I)
            if not hasattr(flexcache, name) and not (ROOT / "flexcache" / name).is_dir()
        ]
    assert len(found) > 150, "remedies are no longer found"
    assert not wrong, "\n".join(wrong)


def test_remedies_for_a_file_name_its_keys_and_no_arguments_of_python() -> None:
    for file in ("capture", "replay"):
        keys = key_names(file)  # type: ignore[arg-type]
        for where, text in remedies():
            written = as_yaml(text.replace("*=", "text="), keys)
            left = [name for name in re.findall(r"\b([a-z_]+)=(?!=|\(\))", CALL.sub("()", written)) if name in keys]
            assert not left, f"{where}: {written}"
            assert "open_documents" not in written, f"{where}: {written}"
