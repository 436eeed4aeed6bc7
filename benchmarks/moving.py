"""Copying and exporting a store beside what people would type instead.

    python -m benchmarks.moving [--mebibytes 256] [--rounds 5]

One layer of bfloat16 rows of 2,048 features, warm, and every variant flushes what it writes. The floor of a copy is
``cp -r``, which checks nothing; the peer is ``cp -r`` and then the checksum of every file. The floor of an export is a
scan of the store into a plain file; the peer is `safetensors.torch.save_file` of a tensor read from the store.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

import flexcache
from benchmarks.read import build
from benchmarks.timing import interleave, ratio, show
from flexcache.exchange.exporting import export
from flexcache.store.manage.copy import copy
from flexcache.store.storage.atomic_files import fsync_tree
from flexcache.store.storage.backend import digest, relative_files


def variants(store: flexcache.Store, folder: Path) -> dict[str, Callable[[], None]]:
    """Return what is timed, by name; each removes what it wrote the time before."""

    def fresh(name: str) -> Path:
        shutil.rmtree(folder / name, ignore_errors=True)
        return folder / name

    def cp(name: str) -> Path:
        target = fresh(name)
        subprocess.run(["cp", "-r", "--reflink=auto", str(store.path), str(target)], check=True)
        fsync_tree(target)
        return target

    def cp_and_digest() -> None:
        target = cp("checked")
        for name in relative_files(target):
            digest(target / name)

    def floor() -> None:
        target = fresh("floor")
        target.mkdir()
        with (target / "rows.bin").open("wb") as file:
            for _, values in store.scan("resid_post", 0, raw=True):
                file.write(values.view("u1").data)
        fsync_tree(target)

    def save() -> None:
        target = fresh("save")
        target.mkdir()
        values = store.read("resid_post", 0, raw=True)
        save_file({"rows": torch.from_numpy(values.view("i2")).view(torch.bfloat16)}, target / "rows.safetensors")
        fsync_tree(target)

    def wholly(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            call()

        return run

    return {
        "cp": wholly(lambda: cp("cp")),
        "cp, checksums": cp_and_digest,
        "copy": wholly(lambda: copy(store.path, fresh("copy"))),
        "copy to float32": wholly(lambda: copy(store.path, fresh("wide"), dtype="float32")),
        "scan into a file": floor,
        "save_file": save,
        "export": wholly(lambda: export(store.path, fresh("export"), "safetensors")),
    }


def main() -> None:
    """Build a store, time everything in turns, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flexcache-moving-") as place:
        store, raw = build(Path(place), options.mebibytes << 8)
        raw.unlink()
        seconds = interleave(variants(store, Path(place)), options.rounds)
    show(
        f"moving {options.mebibytes} MiB",
        [
            ("flexcache copy ÷ cp -r", f"{ratio(seconds['copy'], seconds['cp']):.2f}", "floor, unchecked"),
            ("flexcache copy ÷ cp -r and checksums", f"{ratio(seconds['copy'], seconds['cp, checksums']):.2f}", "peer"),
            (
                "copy --dtype float32 ÷ cp -r",
                f"{ratio(seconds['copy to float32'], seconds['cp']):.2f}",
                "twice the bytes",
            ),
            (
                "flexcache export ÷ a scan into a file",
                f"{ratio(seconds['export'], seconds['scan into a file']):.2f}",
                "",
            ),
            ("flexcache export ÷ read and save_file", f"{ratio(seconds['export'], seconds['save_file']):.2f}", "peer"),
        ],
    )


if __name__ == "__main__":
    main()
