"""Processes that run Python, forked from a server that has loaded torch: that takes longer than most tests."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto.modeling_auto",
        "flexcache.recording.capture",
    ]
)


def start(function: Callable[..., object], *arguments: Any, folder: Path, output: Path | None = None) -> BaseProcess:
    """Start a function of a module in *folder*, and write what it prints into *output*."""
    process = CONTEXT.Process(target=_call, args=(function, arguments, folder, output or os.devnull))
    process.start()
    return process


def run(function: Callable[..., object], *arguments: Any, folder: Path, output: Path) -> str:
    """Return what a function prints; it must end without an error."""
    process = start(function, *arguments, folder=folder, output=output)
    process.join(300)
    text = output.read_text(encoding="utf-8")
    assert process.exitcode == 0, text[-3000:]
    return text


def script(path: str, *arguments: str) -> None:
    """Run a file as ``python FILE ARGUMENTS`` does."""
    sys.argv, sys.path[0] = [path, *arguments], str(Path(path).parent)
    runpy.run_path(path, run_name="__main__")


def module(name: str, *arguments: str) -> None:
    """Run a module as ``python -m NAME ARGUMENTS`` does."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _call(function: Callable[..., object], arguments: tuple[Any, ...], folder: Path, output: str | Path) -> None:
    import torch

    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    os.chdir(folder)
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    function(*arguments)
