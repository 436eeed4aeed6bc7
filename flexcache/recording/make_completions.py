"""Make the completions of documents, shared among processes, with the activations of their generation if asked."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from flexcache import hooks
from flexcache.chat_options import ChatOptions
from flexcache.documents import open_documents
from flexcache.errors import ConfigError, DocumentsError, MismatchError
from flexcache.hooks.locate.evaluation_mode import evaluation_mode
from flexcache.identity import stored_record
from flexcache.identity.describe import describe_model
from flexcache.identity.tokenizer import describe_tokenizer
from flexcache.options import Generation, SpecialTokens
from flexcache.plan import Batching
from flexcache.progress import ProgressCallback
from flexcache.recording.completions import (
    COMPLETE,
    REQUEST,
    Completions,
    CompletionWriter,
    check_generates,
    prompt_parts,
)
from flexcache.recording.decoded_activations import ActivationReader, activations_file
from flexcache.recording.planning.store_identity import check_same
from flexcache.recording.run.fingerprint import fingerprint
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.store.storage.atomic_files import write_durably, write_json
from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.write.claims import Claiming
from flexcache.store.write.election import POLL, elect, working
from flexcache.store.write.worker import Worker

OWN = ("prompt_tokens", "generated", "completion", "prompt")
CAPTURE, CONDITIONS, SPECIAL, SETTINGS = "capture", "fingerprint", "special_tokens", "generation_config"
WITHOUT_EFFECT = (
    *("temperature", "top_p", "top_k", "do_sample", "max_new_tokens", "max_length", "num_return_sequences"),
    *("pad_token_id", "bos_token_id", "use_cache", "cache_implementation", "output_attentions"),
    *("output_hidden_states", "return_dict_in_generate", "transformers_version", "_from_model_config"),
)
"""Settings of a model's generation that the options replace, or that change no token."""


@dataclass(frozen=True)
class Reading:
    """The activations to read while completions are generated.

    Attributes
    ----------
    points : tuple of HookPoint
    arrays : dict
        As `describe_arrays` returns them.
    batching : str
        The prompts that may share a batch.
    stored : bool
        True if a store has all of them, so that they need not be read.
    """

    points: tuple[hooks.HookPoint, ...]
    arrays: dict[str, Any]
    batching: Batching
    stored: bool


def make_completions(
    model: torch.nn.Module,
    tokenizer: Any,
    documents: Any,
    completions: Completions,
    generation: Generation,
    progress: ProgressCallback,
    heartbeat_timeout: float,
    reading: Reading | None = None,
    chat: ChatOptions | None = None,
    special_tokens: SpecialTokens = "auto",
) -> dict[str, Any]:
    """Write the missing parts of *completions*, together with other processes, and return the request of the folder.

    Errors as of `flexcache.generate`.
    """
    check_generates(model)
    corpus = open_documents(documents)
    if corpus.content == "image":
        raise DocumentsError("images cannot be completed", expected="documents of texts, messages or tokens")
    if chat is not None and corpus.content != "messages":
        raise ConfigError("chat is for documents of messages", found=corpus.content, remedy="leave it out")
    if taken := [name for name in corpus.labels if name in OWN]:
        raise DocumentsError(f"a label cannot be called {taken[0]!r} here", remedy="rename the column")
    completions.folder.mkdir(parents=True, exist_ok=True)
    now = fingerprint(model)
    asked = {
        "generate": generation.model_dump(mode="json"),
        "model": stored_record(describe_model(model, now)),
        "tokenizer": describe_tokenizer(tokenizer, corpus.content == "messages", chat),
        "documents": corpus.describe(),
    }
    if reading is not None:
        asked[CAPTURE] = {"arrays": reading.arrays, "batching": reading.batching, CONDITIONS: now}
    if chat is not None and (options := chat.model_dump(mode="json")):
        asked["chat"] = options
    asked, request = json.loads(json.dumps(asked)) | {SETTINGS: _settings(model)}, completions.request
    earlier = json.loads(request.read_bytes()) if request.exists() else None
    if earlier is not None and SETTINGS not in earlier:  # an earlier version began them
        del asked[SETTINGS]
    if corpus.content == "text":
        asked[SPECIAL] = special_tokens
        if special_tokens == "auto" and earlier is not None and SPECIAL not in earlier:
            special_tokens = "always"  # as the earlier version did that began them
            del asked[SPECIAL]
    if completions.complete and (reading is None or reading.stored or _all_read(completions)):
        found: dict[str, Any] = json.loads(request.read_bytes())
        check_same(_without_conditions(found), _without_conditions(asked), completions.folder)
        return found
    with closing(ModelParallelGroup(model)) as group:
        if not group.alone:
            raise ConfigError(
                "completions need a model that one process holds",
                found=f"{type(model).__name__}, over several processes",
                remedy="make the completions first, without model.parallel, then capture them",
            )
    done = new = 0
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        reader = None
        if reading is not None:
            reader = stack.enter_context(ActivationReader(model, reading.points, reading.arrays))
        batching: Batching = reading.batching if reading else "padded"
        writer = CompletionWriter(model, tokenizer, generation, batching, reader, chat, special_tokens)
        worker, claims = stack.enter_context(
            working(completions.folder, lambda: completions.complete, heartbeat_timeout)
        )
        if elect(worker, claims, REQUEST, request.exists):
            write_json(request, asked)
            claims.release(REQUEST)
        check_same(json.loads(request.read_bytes()), asked, completions.folder)
        left: dict[int, pa.Table] = {}  # parts that other processes have claimed
        parts = PartMaker(writer, completions, worker, claims, activations=reading is not None)

        def make_parts() -> None:
            nonlocal done, new
            for made in [number for number, prompts in left.items() if parts.make_part(number, prompts)]:
                done += len(left.pop(made))
                new += completions.new_tokens(made)
                progress(done, new)

        for number, part in enumerate(prompt_parts(corpus)):
            left[number] = part
            make_parts()
        while left:
            time.sleep(POLL)
            make_parts()
        write_durably(completions.folder / COMPLETE, str(done).encode())
    return asked


@dataclass(frozen=True)
class PartMaker:
    """Makes the parts that no other process has claimed."""

    writer: CompletionWriter
    completions: Completions
    worker: Worker
    claims: Claiming
    activations: bool

    def make_part(self, number: int, prompts: pa.Table) -> bool:
        """Write a part unless it exists or another process has claimed it; return True if it exists."""
        if self._exists(number):
            return True
        if self.claims.take_claim([number]) is None:
            return False
        if not self._exists(number):
            with clear_errors(self.completions.folder):
                self._write(number, prompts)
        self.claims.release(number)
        return True

    def _exists(self, number: int) -> bool:
        read = not self.activations or activations_file(self.completions.folder, number).exists()
        return read and self.completions.part(number).exists()

    def _write(self, number: int, prompts: pa.Table) -> None:
        path, target = self.completions.part(number), activations_file(self.completions.folder, number)
        unfinished = self.worker.folder / target.name
        table = self.writer.table(prompts, number, unfinished if self.activations else None)
        if path.exists() and not pq.read_table(path, columns=["tokens"]).equals(table.select(["tokens"])):
            raise MismatchError(
                "the model completes prompts otherwise than before, so the activations of the completions are lost",
                where=str(path),
                remedy="run it on the machine that made them, or remove the store and its completions",
            )
        if self.activations:
            unfinished.replace(target)
        if not path.exists():
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, compression="zstd")
            write_durably(path, sink.getvalue().to_pybytes())


def _settings(model: Any) -> dict[str, Any]:
    """Return the settings of a model's own generation that change completions, as plain values."""
    settings = json.loads(json.dumps(model.generation_config.to_diff_dict(), default=str))
    return {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}


def _all_read(completions: Completions) -> bool:
    """Return True if the activations of every part exist."""
    parts = [int(path.stem.removeprefix("part-")) for path in completions.folder.glob("part-*.parquet")]
    return all(activations_file(completions.folder, number).exists() for number in parts)


def _without_conditions(request: dict[str, Any]) -> dict[str, Any]:
    """Return a request without the conditions of forwards, which do not matter once all of them were made."""
    if CAPTURE not in request:
        return request
    return {**request, CAPTURE: {name: value for name, value in request[CAPTURE].items() if name != CONDITIONS}}
