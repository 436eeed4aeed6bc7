"""Completions: a model goes on with prompts, and the results are documents of tokens, kept in files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash

from flexcache.documents import Documents, open_documents
from flexcache.errors import ConfigError, DocumentsError
from flexcache.hooks.read.measure import input_device
from flexcache.identity import for_store
from flexcache.identity.describe import describe_model
from flexcache.model import describe_tokenizer, evaluating, longest_input, pad_id
from flexcache.options import Generation
from flexcache.paths import local_path
from flexcache.recording.arguments import model_of, tokenizer_of
from flexcache.recording.planning.planning import check_same
from flexcache.recording.run.fingerprint import fingerprint
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.sequences.chat import check_template
from flexcache.store.storage.atomic_files import write_durably, write_json
from flexcache.store.write.backends import AnyWorker
from flexcache.store.write.claims import Claiming
from flexcache.store.write.election import POLL, elect, working
from flexcache.store.write.worker import HEARTBEAT_TIMEOUT

PART = 64
"""Documents of a file of completions: what is made, and resumed, as a whole."""
REQUEST, COMPLETE = "request", "complete"
OWN = ("prompt_tokens", "generated", "completion", "prompt")


@dataclass(frozen=True)
class Completions:
    """A folder of completions.

    Attributes
    ----------
    folder : Path
    """

    folder: Path

    @property
    def complete(self) -> bool:
        """Whether all of them are made."""
        return (self.folder / COMPLETE).is_file()

    def open(self) -> Documents:
        """Return them as documents of tokens.

        Raises
        ------
        DocumentsError
            They are not all made.
        """
        if not self.complete:
            raise DocumentsError(
                "the completions are not made yet", where=str(self.folder), remedy="run the capture, which makes them"
            )
        return open_documents(str(self.folder / "part-*.parquet"), text=None)

    def part(self, number: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"part-{number:06d}.parquet"

    def new_tokens(self, number: int) -> int:
        """Return how many tokens the completions of a part have."""
        spans = pq.read_table(self.part(number), columns=["generated"]).column("generated").to_pylist()
        return sum(span["end"] - span["start"] for [span] in spans)


def generate(
    model: Any,
    tokenizer: Any,
    documents: Any,
    folder: str | Path,
    generation: Generation,
    progress: Callable[[int, int], None] = lambda documents, tokens: None,
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
) -> Documents:
    """Let a model complete documents, and return prompts with completions as documents of tokens.

    They are written to *folder*, 64 documents a file; the same call goes on behind the files that are there, to the
    same result, on the same machine. Any number of processes may make the call at once: each makes files that nobody
    has claimed, takes over those of who is gone, and returns when all are there; the files are those that one process
    makes. Documents of messages are prompts for the assistant's next one.

    Parameters
    ----------
    model, tokenizer
        A causal language model of transformers. The tokenizer may be None for documents of tokens.
    progress
        Called with the documents and new tokens done so far, those of earlier runs and of other processes included.
    heartbeat_timeout
        Seconds without a sign of life after which a process on another machine counts as gone.

    Returns
    -------
    Documents
        With ``tokens``, ``prompt_tokens`` (the number of those of the prompt), ``generated`` (the span of the
        completion, for rows and targets), the texts ``prompt`` and ``completion``, and the labels.

    Raises
    ------
    ConfigError
        The model cannot generate, or is spread over several processes.
    DocumentsError
        A prompt is empty, an image, or leaves no room for the completion; a label has the name of one of these columns.
    MismatchError
        The folder holds completions of something else.
    """
    model = model_of(model)
    tokenizer = tokenizer_of(tokenizer, model)
    if not hasattr(model, "generate") or not getattr(model, "can_generate", lambda: False)():
        raise ConfigError(
            "the model cannot generate",
            expected="a causal language model of transformers",
            found=type(model).__name__,
            remedy="load it with loader: AutoModelForCausalLM",
        )
    corpus = open_documents(documents)
    if corpus.content == "image":
        raise DocumentsError("images cannot be completed", expected="documents of texts, messages or tokens")
    if taken := [name for name in corpus.labels if name in OWN]:
        raise DocumentsError(f"a label cannot be called {taken[0]!r} here", remedy="rename the column")
    completions = Completions(local_path(folder))
    completions.folder.mkdir(parents=True, exist_ok=True)
    asked = _request(model, tokenizer, corpus, generation)
    if completions.complete:
        check_same(json.loads((completions.folder / REQUEST).read_bytes()), asked, completions.folder)
        return completions.open()
    with closing(ModelParallelGroup(model)) as group:
        if not group.alone:
            raise ConfigError(
                "completions are made by models that one process holds",
                found=f"{type(model).__name__}, over several processes",
                remedy="make the completions first, without model.parallel, then capture them",
            )
    writer = _Writer(model, tokenizer, generation)
    done = new = 0
    with (
        evaluating(model),
        working(completions.folder, lambda: completions.complete, heartbeat_timeout) as (worker, claims),
    ):
        _agree(worker, completions.folder / REQUEST, asked, claims)
        left: dict[int, pa.Table] = {}  # others are at work on those, a part each
        for number, part in _then_none(enumerate(_parts(corpus))):
            left |= {} if part is None else {number: part}
            while left:
                for made in [at for at, prompts in left.items() if _made(writer, completions, claims, at, prompts)]:
                    done += len(left.pop(made))
                    new += completions.new_tokens(made)
                    progress(done, new)
                if part is not None or not left:
                    break
                time.sleep(POLL)
        write_durably(completions.folder / COMPLETE, str(done).encode())
    return completions.open()


def _agree(worker: AnyWorker, path: Path, asked: dict[str, Any], claims: Claiming) -> None:
    """Write what is asked for, where no process has, and refuse anything else."""
    if elect(worker, claims, REQUEST, path.exists):
        write_json(path, asked)
        claims.release(REQUEST)
    check_same(json.loads(path.read_bytes()), asked, path.parent)


def _made(writer: _Writer, completions: Completions, claims: Claiming, number: int, prompts: pa.Table) -> bool:
    """Make a part that is not there and that nobody is at work on; return whether it is there."""
    path = completions.part(number)
    if path.exists():
        return True
    if claims.take_claim([number]) is None:
        return False
    if not path.exists():
        sink = pa.BufferOutputStream()
        pq.write_table(writer.table(prompts, number), sink, compression="zstd")
        write_durably(path, sink.getvalue().to_pybytes())
    claims.release(number)
    return True


def _then_none(parts: Iterable[tuple[int, pa.Table]]) -> Iterator[tuple[int, pa.Table | None]]:
    yield from parts
    yield -1, None


class _Writer:
    """Makes the completions of one part; what they are depends on the part, its number and the options alone."""

    def __init__(self, model: Any, tokenizer: Any, generation: Generation) -> None:
        self._model, self._tokenizer, self._generation = model, tokenizer, generation
        self._pad = pad_id(model, tokenizer)
        self._most = longest_input(model, tokenizer)

    def table(self, part: pa.Table, number: int) -> pa.Table:
        """Return a part of the corpus with completions."""
        prompts = self._prompts(part)
        made: dict[int, list[int]] = {}
        order = sorted(range(len(prompts)), key=lambda line: len(prompts[line]))
        with torch.random.fork_rng(devices=[]):
            for start in range(0, len(order), self._generation.batch):
                lines = order[start : start + self._generation.batch]
                torch.manual_seed(xxhash.xxh3_64_intdigest(f"{self._generation.seed} {number} {start}".encode()) >> 1)
                made |= dict(zip(lines, self._complete([prompts[line] for line in lines]), strict=True))
        tokens = [prompt + made[line] for line, prompt in enumerate(prompts)]
        spans = [[{"start": len(p), "end": len(t), "label": "completion"}] for p, t in zip(prompts, tokens)]
        columns: dict[str, Any] = {
            "id": part.column("id"),
            "tokens": pa.array(tokens, pa.list_(pa.int32())),
            "prompt_tokens": pa.array([len(prompt) for prompt in prompts], pa.int32()),
            "generated": pa.array(spans),
        }
        if self._tokenizer is not None:
            columns["prompt"] = pa.array([self._text(prompt) for prompt in prompts])
            columns["completion"] = pa.array([self._text(made[line]) for line in range(len(prompts))])
        labels = part.column_names[2:]
        return pa.table(columns | {name: part.column(name) for name in labels})

    @cached_property
    def _ends(self) -> set[int]:
        ends = getattr(self._model.generation_config, "eos_token_id", None)
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _prompts(self, part: pa.Table) -> list[list[int]]:
        content = part.column_names[1]
        if content == "tokens":
            prompts = part.column(1).to_pylist()
        elif self._tokenizer is None:
            raise DocumentsError(
                "the prompts are texts, but there is no tokenizer", remedy="pass the model's tokenizer"
            )
        elif content == "messages":
            check_template(self._tokenizer)
            chats = part.column(1).to_pylist()
            rendered = [
                self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
            ]
            prompts = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        else:
            prompts = self._open_ended(self._tokenizer(part.column(1).to_pylist())["input_ids"])
        room = None if self._most is None else self._most - self._generation.max_new_tokens
        for name, prompt in zip(part.column("id").to_pylist(), prompts):
            if not prompt or (room is not None and len(prompt) > room):
                raise DocumentsError(
                    "a prompt that cannot be completed",
                    where=f"document {name!r}",
                    expected=f"1 to {room} tokens, so that {self._generation.max_new_tokens} more can be read",
                    found=f"{len(prompt)} tokens",
                    remedy="shorten the prompt, or max_new_tokens",
                )
        return [list(prompt) for prompt in prompts]

    def _open_ended(self, prompts: list[list[int]]) -> list[list[int]]:
        """Return prompts without the token that ends a text, where the tokenizer adds one."""
        end, added = self._tokenizer.eos_token_id, self._tokenizer("")["input_ids"]
        closed = len(added) > 0 and added[-1] == end and (len(added) > 1 or end != self._tokenizer.bos_token_id)
        return [prompt[:-1] for prompt in prompts] if closed else prompts

    def _complete(self, prompts: list[list[int]]) -> list[list[int]]:
        from transformers import GenerationConfig

        options = self._generation
        width = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        device = input_device(self._model)
        drawn = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k or 0}
        settings = GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            do_sample=options.temperature > 0,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=self._pad,
            **(drawn if options.temperature > 0 else {}),
        )
        with torch.no_grad():
            out = self._model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )
        return [self._until_end(line) for line in out[:, width:].cpu().numpy()]

    def _until_end(self, tokens: np.ndarray) -> list[int]:
        """Return the tokens up to the one that ends the completion, that one included; the rest is padding."""
        ends = np.flatnonzero(np.isin(tokens, list(self._ends)))
        return [int(token) for token in (tokens[: ends[0] + 1] if len(ends) else tokens)]


def _parts(corpus: Documents) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    for batch in corpus.batches():
        held.append(pa.Table.from_batches([batch]))
        while sum(map(len, held)) >= PART:
            table = pa.concat_tables(held, promote_options="permissive")
            yield table.slice(0, PART)
            held = [table.slice(PART)]
    if sum(map(len, held)):
        yield pa.concat_tables(held, promote_options="permissive")


def _request(model: Any, tokenizer: Any, corpus: Documents, generation: Generation) -> dict[str, Any]:
    """Return what the completions depend on."""
    request = {
        "generate": generation.model_dump(mode="json"),
        "model": for_store(describe_model(model, fingerprint(model))),
        "tokenizer": describe_tokenizer(tokenizer, corpus.content == "messages"),
        "documents": corpus.describe(),
    }
    found: dict[str, Any] = json.loads(json.dumps(request))
    return found
