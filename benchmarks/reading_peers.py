"""Start other tools that read arrays, in `.venv-reading-peers`, and have them read the shard files of a store."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import flexcache

SCRIPT = Path(__file__).parent / "peers" / "reading.py"
PYTHON = Path(sys.prefix).parent / ".venv-reading-peers" / "bin" / "python"


class ReadingPeer:
    """A tool in a process of its own, which ends with *stack*."""

    def __init__(self, array: Path, tool: str, settings: list[str], stack: contextlib.ExitStack) -> None:
        command = [str(PYTHON), str(SCRIPT), str(array), tool, *settings]
        self.process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert self.process.stdin is not None
        stack.callback(self.process.stdin.close)
        self.version = self._answer()

    def ask(self, what: str) -> float:
        """Return the seconds that the tool took to do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def flattened(store: flexcache.Store, path: Path) -> Path:
    """Return a Zarr array (token, hidden) of the bits of layer 0, whose shards are the store's files.

    The files are hard links. Other tools read 16-bit integers as they are, but not bfloat16, or a third dimension.
    """
    source = store.path / "resid_post"
    metadata = json.loads((source / "zarr.json").read_text())
    inner = metadata["codecs"][0]["configuration"]
    metadata |= {"shape": metadata["shape"][1:], "data_type": "uint16", "fill_value": 0, "attributes": {}}
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = metadata["chunk_grid"]["configuration"]["chunk_shape"][1:]
    inner["chunk_shape"] = inner["chunk_shape"][1:]
    del metadata["dimension_names"]
    for shard in (source / "c" / "0").iterdir():
        (path / "c" / shard.name).mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (path / "c" / shard.name / "0").hardlink_to(shard / "0")
    (path / "zarr.json").write_text(json.dumps(metadata))
    return path
