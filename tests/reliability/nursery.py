"""Fork a capturing process for each input line, from a process that has loaded torch and a tiny model.

Starting Python and torch for each of many processes would take longer than their work.

    python -m tests.reliability.nursery STORE LOG     a line "start" or "start 0.5" (timeout); answers with a pid
                                                      a line "step 17 STORE": a small capture, killed at this step
                                                      on the file system; -1 counts the steps into STORE.steps

The variable SEGMENTS makes the corpus one of several segments, whose units are captured while others are planned.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

import flexcache
import flexcache.store.write.election as election
from flexcache.recording.run.recorder import Recorder
from tests.corpora import lengths, token_documents
from tests.models import VOCABULARY, tiny
from tests.reliability.steps import Steps, counted, killed

DOCUMENTS = token_documents(lengths(400, longest=30), vocabulary=VOCABULARY)
SEGMENTS = "SEGMENTS" in os.environ
OPTIONS: dict[str, Any] = {"progress": False, "batch_tokens": 64}
if SEGMENTS:
    OPTIONS["segment_tokens"] = 200
SMALL: dict[str, Any] = {"sites": ["resid_post", "z"], "layers": [1, 3], "keep": {"resid_post": "all"}, **OPTIONS}
"""Options of the small capture, with two layers on disk and two virtual ones."""


def corpus(count: int | None = None) -> flexcache.Documents:
    documents = flexcache.open_documents(DOCUMENTS[:count], batch_rows=8 if SEGMENTS else 1024)
    if SEGMENTS:
        read = documents.batches

        def read_slowly() -> Iterator[pa.RecordBatch]:
            for batch in read():
                yield batch
                time.sleep(0.01)

        documents.batches = read_slowly  # type: ignore[method-assign]
    return documents


def capture(path: str, heartbeat_timeout: float = 1e6) -> flexcache.Store:
    return flexcache.capture(tiny("llama"), None, corpus(), path, heartbeat_timeout=heartbeat_timeout, **OPTIONS)


def child(path: str, log: str, heartbeat_timeout: float) -> None:
    begin = Recorder.begin_unit

    def noted(self: Recorder, unit: int) -> Any:
        with open(log, "a") as file:
            file.write(f"{unit} {os.getpid()}\n")
        return begin(self, unit)

    Recorder.begin_unit = noted  # type: ignore[method-assign]
    try:
        capture(path, heartbeat_timeout)
    except BaseException:
        Path(f"{log}.{os.getpid()}.error").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def small(path: str, at: int) -> None:
    steps = Steps(Path(path).parent, at, killed)
    with counted(steps):
        flexcache.capture(tiny("llama"), None, corpus(60), path, **SMALL)
    Path(f"{path}.steps").write_text(" ".join(steps.taken))


def main(path: str, log: str) -> None:
    torch.set_num_threads(1)
    election.POLL = 0.02
    tiny("llama")(input_ids=torch.ones(1, 2, dtype=torch.int64))
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            if line.startswith("step"):
                _, at, place = line.split()
                small(place, int(at))
                os._exit(0)
            child(path, log, float((line.split()[1:] or ["1e6"])[0]))
        print(pid, flush=True)


if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that children leave no zombies
    main(sys.argv[1], sys.argv[2])
