"""Generate completions of documents, and keep them in files as documents of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from flexcache.chat_options import ChatOptions
from flexcache.documents import Documents
from flexcache.errors import ConfigError
from flexcache.options import Generation, SequenceOptions, SpecialTokens
from flexcache.paths import local_path
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.recording.arguments import model_of, tokenizer_of
from flexcache.recording.completions import Completions
from flexcache.recording.fields import GenerateFields, split_fields
from flexcache.recording.make_completions import make_completions
from flexcache.recording.run_options import RunOptions
from flexcache.validation import validate


def generate(
    model: Any,
    tokenizer: Any,
    documents: Any,
    folder: str | Path,
    generation: Generation | None = None,
    progress: ProgressCallback = ignore_progress,
    *,
    chat: ChatOptions | Mapping[str, Any] | None = None,
    special_tokens: SpecialTokens = "auto",
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
    special_tokens
        Special tokens in front of prompts that are texts, as of `flexcache.capture`; see docs/configuration.md.
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
    special_tokens = validate(SequenceOptions, {"special_tokens": special_tokens}, where).special_tokens
    if generation.capture:
        raise ConfigError(
            "flexcache.generate stores no activations",
            where=where,
            remedy="let the capture generate: flexcache.capture(model, tokenizer, prompts, path, generate={…,"
            ' "capture": True})',
        )
    model = model_of(model)
    tokenizer = tokenizer_of(tokenizer, model)
    completions = Completions(local_path(folder))
    make_completions(
        model,
        tokenizer,
        documents,
        completions,
        generation,
        progress,
        heartbeat_timeout,
        chat=chat,
        special_tokens=special_tokens,
    )
    return completions.open()
