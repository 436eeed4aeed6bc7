"""Generate completions of documents, and keep them in files as documents of tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Unpack

import pyarrow as pa
import pyarrow.parquet as pq

from flexcache.chat_options import ChatOptions
from flexcache.documents import Documents, open_documents
from flexcache.errors import ConfigError, DocumentsError
from flexcache.hooks.locate.evaluation_mode import evaluation_mode
from flexcache.identity import stored_record
from flexcache.identity.describe import describe_model
from flexcache.identity.tokenizer import describe_tokenizer
from flexcache.options import Generation
from flexcache.paths import local_path
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.recording.arguments import model_of, tokenizer_of
from flexcache.recording.completions import COMPLETE, Completions, CompletionWriter, prompt_parts
from flexcache.recording.fields import GenerateFields, split_fields
from flexcache.recording.planning.store_identity import check_same
from flexcache.recording.run.fingerprint import fingerprint
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.recording.run_options import RunOptions
from flexcache.store.storage.atomic_files import write_durably, write_json
from flexcache.store.write.claims import Claiming
from flexcache.store.write.election import POLL, elect, working
from flexcache.store.write.worker import Worker
from flexcache.validation import validate

REQUEST = "request"
OWN = ("prompt_tokens", "generated", "completion", "prompt")


def generate(
    model: Any,
    tokenizer: Any,
    documents: Any,
    folder: str | Path,
    generation: Generation | None = None,
    progress: ProgressCallback = ignore_progress,
    *,
    chat: ChatOptions | Mapping[str, Any] | None = None,
    options: RunOptions | None = None,
    **fields: Unpack[GenerateFields],
) -> Documents:
    """Complete documents with a model, and return prompts with completions as documents of tokens.

        documents = flexcache.generate(model, tokenizer, prompts, "completions", max_new_tokens=64)

    They are written to *folder*, 64 documents a file; the same call continues after the existing files, with the same
    result on the same machine. Any number of processes may make the call at once: each writes files that no other
    process has claimed, takes over the files of a process that is gone, and returns when all files exist. The files are
    those that one process would write. Documents of messages are prompts for the next message of the assistant.

    Parameters
    ----------
    model, tokenizer
        A causal language model of transformers. The tokenizer may be None for documents of tokens.
    generation
        How completions are sampled; its fields can also be given one by one, as *fields*.
    progress
        Called with the documents and new tokens so far, those of earlier runs and of other processes included.
    chat
        Options of the chat template, for documents of messages.
    options
        Only *heartbeat_timeout* applies; it can also be given as a keyword.

    Returns
    -------
    Documents
        With ``tokens``, ``prompt_tokens`` (the number of tokens of the prompt), ``generated`` (the span of the
        completion, for rows and targets), the texts ``prompt`` and ``completion``, and the labels.

    Raises
    ------
    ConfigError
        The model cannot generate or is spread over several processes, or a field is unknown or cannot be used.
    DocumentsError
        A prompt is empty, is an image, or leaves no room for the completion; or a label has the name of one of these
        columns.
    MismatchError
        The folder holds completions of something else.
    """
    where = "flexcache.generate"
    _, given, run = split_fields(fields, GenerateFields, None, options, where)
    heartbeat_timeout = run.heartbeat_timeout
    if given or not isinstance(generation, Generation):
        kept = generation.model_dump() if isinstance(generation, Generation) else generation or {}
        generation = validate(Generation, {**kept, **given}, where)
    if chat is not None and not isinstance(chat, ChatOptions):
        chat = validate(ChatOptions, chat, where)
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
    if chat is not None and corpus.content != "messages":
        raise ConfigError("chat is for documents of messages", found=corpus.content, remedy="leave it out")
    if taken := [name for name in corpus.labels if name in OWN]:
        raise DocumentsError(f"a label cannot be called {taken[0]!r} here", remedy="rename the column")
    completions = Completions(local_path(folder))
    completions.folder.mkdir(parents=True, exist_ok=True)
    asked = _request(model, tokenizer, corpus, generation, chat)
    if completions.complete:
        check_same(json.loads((completions.folder / REQUEST).read_bytes()), asked, completions.folder)
        return completions.open()
    with closing(ModelParallelGroup(model)) as group:
        if not group.alone:
            raise ConfigError(
                "completions need a model that one process holds",
                found=f"{type(model).__name__}, over several processes",
                remedy="make the completions first, without model.parallel, then capture them",
            )
    writer = CompletionWriter(model, tokenizer, generation, chat)
    done = new = 0
    with (
        evaluation_mode(model),
        working(completions.folder, lambda: completions.complete, heartbeat_timeout) as (worker, claims),
    ):
        _agree(worker, completions.folder / REQUEST, asked, claims)
        left: dict[int, pa.Table] = {}  # parts that other processes have claimed

        def make_parts() -> None:
            nonlocal done, new
            for made in [at for at, prompts in left.items() if _made(writer, completions, claims, at, prompts)]:
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
    return completions.open()


def _agree(worker: Worker, path: Path, asked: dict[str, Any], claims: Claiming) -> None:
    """Write the request unless another process has, and raise MismatchError if its request differs."""
    if elect(worker, claims, REQUEST, path.exists):
        write_json(path, asked)
        claims.release(REQUEST)
    check_same(json.loads(path.read_bytes()), asked, path.parent)


def _made(writer: CompletionWriter, completions: Completions, claims: Claiming, number: int, prompts: pa.Table) -> bool:
    """Write a part unless it exists or another process has claimed it; return True if it exists."""
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


def _request(
    model: Any, tokenizer: Any, corpus: Documents, generation: Generation, chat: ChatOptions | None
) -> dict[str, Any]:
    """Return everything that determines the completions."""
    request = {
        "generate": generation.model_dump(mode="json"),
        "model": stored_record(describe_model(model, fingerprint(model))),
        "tokenizer": describe_tokenizer(tokenizer, corpus.content == "messages", chat),
        "documents": corpus.describe(),
    }
    if chat is not None and (asked := chat.model_dump(mode="json")):
        request["chat"] = asked
    found: dict[str, Any] = json.loads(json.dumps(request))
    return found
