"""Faults injected and survived, bytes lost, and what the promises of docs/reliability.md cost.

    python -m benchmarks.reliability [--kills 600] [--faults 300] [--corruptions 400] [--mebibytes 512] [--rounds 5]

Kills are SIGKILLs of real processes: half before a step on the file system that is drawn at random, half at a random
moment. Faults are ENOSPC and EIO at a step drawn at random. Both are spread evenly over all commands that make or
change a store; after each, what is there is read and compared row by row with what it must be, the same command is
given again, and its files are compared with those of an undisturbed run. Corruptions are of a file drawn at random: of
a shard or record, `repair` and the same capture must restore the bytes; of anything else, `verify` must name it.

Costs are of captures in turn, with fsync or hashing switched off: of numpy arrays, where nothing but writing takes
time, and of all layers of SmolLM2.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch

import flexcache
from benchmarks.capture import Bench
from benchmarks.timing import console, interleave, ratio, show
from flexcache.store.storage.backend import relative_files
from tests.reliability.commands import COMMANDS, OLD, content, fill, make_base
from tests.reliability.steps import BROKEN, FULL, killed
from tests.reliability.test_damage import DAMAGES
from tests.reliability.trial import Trial

FEATURES = 2048
Row = tuple[str, str, str]


def disturb(base: Path, kills: int, faults: int, dice: random.Random) -> list[Row]:
    """Disturb every command alike often, and count."""
    found: Counter[str] = Counter()
    for name in COMMANDS:
        trial = Trial(name, base, base.with_name("work"))
        for number in range(-(-kills // len(COMMANDS))):
            if number % 2:
                result = trial.disturb(kill_after=dice.uniform(0, trial.seconds))
            else:
                result = trial.disturb(dice.randrange(len(trial.steps)), killed)
            found["kills"] += result.outcome.killed
            found["kills survived"] += result.outcome.killed and result.clear and not result.lost
            found["bytes lost"] += result.lost
        for number in range(-(-faults // len(COMMANDS))):
            result = trial.disturb(dice.randrange(len(trial.steps)), (FULL, BROKEN)[number % 2])
            found["faults"] += 1
            found["faults survived"] += result.clear and not result.lost
            found["errors"] += bool(result.outcome.error)
            found["bytes lost"] += result.lost
        console.print(f"  {name}: {dict(found)}", style="dim", highlight=False)
    return [
        ("SIGKILLs survived, of", f"{found['kills survived']} of {found['kills']}", "all"),
        ("disk faults survived, of", f"{found['faults survived']} of {found['faults']}", "all"),
        ("… of which ended in one clear error, the rest in nothing", f"{found['errors']}", ""),
        ("bytes lost", f"{found['bytes lost']}", "0"),
    ]


def corrupt(base: Path, count: int, dice: random.Random) -> list[Row]:
    """Damage one file of a store at a time, and see that it is named, and mended where a capture can."""
    whole, path = content(base), base.with_name("damaged.zarr")
    names, units = relative_files(base, skip=("runs",)), flexcache.open(base).n_units
    found: Counter[str] = Counter()
    for _ in range(count):
        shutil.copytree(base, path)
        name, damage = dice.choice(names), dice.choice(list(DAMAGES))
        unit = ("/c/" in name and name.split("/")[0] in flexcache.open(base).arrays) or name.startswith("ledger/0/")
        before = (path / name).read_bytes()
        _damage(path, name, damage, dice)
        if (path / name).exists() and (path / name).read_bytes() == before:  # another of the same bytes
            found["without effect"] += 1
            shutil.rmtree(path)
            continue
        found["unit" if unit else "plan"] += 1
        try:
            done = flexcache.repair(path)
            found["named"] += (
                len(flexcache.open(path).committed_units) < units
                if unit
                else name in {finding.file for finding in done.beyond}
            )
            if unit:
                fill(path, OLD)
                found["mended"] += content(path) == whole and flexcache.verify(path).sound
        except flexcache.FlexCacheError:  # zarr.json that cannot be read: it is the error that names it
            found["named"] += name == "zarr.json"
        shutil.rmtree(path)
    return [
        ("corruptions named by verify, of", f"{found['named']} of {found['unit'] + found['plan']}", "all"),
        ("… of shards and records: mended", f"{found['mended']} of {found['unit']}", "all"),
    ]


def _damage(path: Path, name: str, damage: str, dice: random.Random) -> None:
    if damage == "another shard":
        other = dice.choice([p for p in relative_files(path, skip=("runs",)) if p != name])
        shutil.copyfile(path / other, path / name)
    elif damage == "a flipped bit":
        bytes_ = bytearray((path / name).read_bytes())
        bytes_[dice.randrange(len(bytes_))] ^= 1 << dice.randrange(8)
        (path / name).write_bytes(bytes_)
    else:
        DAMAGES[damage](path / name)


class Unhashed:
    """Stands where a hash would be."""

    def update(self, content: object) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 32


@contextmanager
def without(fsync: bool = False, hashing: bool = False) -> Iterator[None]:
    """While open, promises are not kept."""
    unhashed = patch("flexcache.store.write.shard_file.xxhash", SimpleNamespace(xxh3_128=Unhashed))
    unflushed = patch("os.fsync", lambda handle: None)
    with unhashed if hashing else _nothing(), unflushed if fsync else _nothing():
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class Writing:
    """A planned store of numpy rows, the same values again and again: nothing takes time but writing them."""

    def __init__(self, folder: Path, mebibytes: int) -> None:
        self.planned, self.path, length = folder / "planned.zarr", folder / "written.zarr", 256
        documents = [{"tokens": [1] * length} for _ in range((mebibytes << 20) // (4 * 2 * FEATURES * length))]
        sites, tokens = {"resid_post": (4, FEATURES)}, 64 * length
        flexcache.record(self.planned, documents, sites=sites, model="numpy", dtype="float16", batch_tokens=tokens)
        rows = np.random.default_rng(0).standard_normal((tokens, FEATURES), np.float32)
        self.values = rows.astype(np.float16)

    def capture(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.planned, self.path)
        with flexcache.Recorder(self.path) as recorder:
            for batch in recorder.batches():
                for layer in range(4):
                    recorder.put("resid_post", self.values[: len(batch.rows)], rows=batch.rows, layer=layer)


def costs(what: str, capture: Callable[[], None], rounds: int) -> list[Row]:
    """Time a capture with and without its promises, in turn."""

    def timed(**promises: bool) -> Callable[[], float]:
        def run() -> float:
            with without(**promises):
                began = time.perf_counter()
                capture()
                seconds = time.perf_counter() - began
            os.sync()  # what was not flushed is not left to the next one
            return seconds

        return run

    seconds = interleave(
        {
            "as it is": timed(),
            "no fsync": timed(fsync=True),
            "no hashing": timed(hashing=True),
            "neither": timed(fsync=True, hashing=True),
        },
        rounds,
    )
    return [
        (f"{what}: as it is ÷ without {name}", f"{ratio(seconds['as it is'], seconds[key]):.3f}", "")
        for name, key in (("fsync", "no fsync"), ("hashing", "no hashing"), ("both", "neither"))
    ]


def main() -> None:
    """Inject, count, time, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=600)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--corruptions", type=int, default=400)
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as place:
        base = make_base(Path(place) / "base.zarr")
        rows = disturb(base, options.kills, options.faults, dice) + corrupt(base, options.corruptions, dice)
        show("faults", rows)
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(prefix="flexcache-reliability-") as place:
        rows = costs("writing alone", Writing(Path(place), options.mebibytes).capture, options.rounds)
        bench = Bench(Path(place), options.documents)
        rows += costs("SmolLM2, all layers", lambda: bench.flexcache("all"), options.rounds)
        show("costs", rows)


if __name__ == "__main__":
    main()
