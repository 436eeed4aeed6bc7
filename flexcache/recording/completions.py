"""Completions of documents: the folder that holds them, and the writer that makes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash

from flexcache.chat_options import ChatOptions
from flexcache.documents import Documents, open_documents
from flexcache.documents.messages import unpack_messages
from flexcache.errors import CaptureError, ConfigError, DocumentsError
from flexcache.hooks.locate.position_tables import longest_input
from flexcache.hooks.locate.vocabulary import pad_token_id
from flexcache.hooks.read.measure import input_device
from flexcache.options import Generation, SpecialTokens
from flexcache.plan import Batching, batch_groups, parts
from flexcache.recording.decoded_activations import ActivationReader
from flexcache.recording.run.batch_forward import FAILURES
from flexcache.sequences.chats import check_template, render_text
from flexcache.sequences.special_tokens import added_tokens
from flexcache.store.storage.location import StoreLocation, local

PART = 64
"""Documents in a file of completions, which is written, and resumed, as a whole."""
COMPLETE, REQUEST = "complete", "request"


@dataclass(frozen=True)
class Completions:
    """A folder of completions."""

    folder: Path

    @property
    def complete(self) -> bool:
        """True if all completions exist."""
        return (self.folder / COMPLETE).is_file()

    @property
    def request(self) -> Path:
        """The file that says what the completions were made from."""
        return self.folder / REQUEST

    def open(self) -> Documents:
        """Return the completions as documents of tokens; DocumentsError if not all of them exist."""
        if not self.complete:
            raise DocumentsError(
                "the completions are not made yet", where=str(self.folder), remedy="run the capture, which makes them"
            )
        return open_documents(str(self.folder / "part-*.parquet"), text=None)

    @classmethod
    def of_store(cls, path: StoreLocation) -> Completions:
        """Return the completions that a capture with `generate` makes, next to its store."""
        store = local(path, "generate", remedy="generate next to a store in a folder, and copy that")
        return cls(store.with_name(f"{store.name}.completions"))

    def part(self, number: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"part-{number:06d}.parquet"

    def new_tokens(self, number: int) -> int:
        """Return the number of tokens that the completions of a part have."""
        spans = pq.read_table(self.part(number), columns=["generated"]).column("generated").to_pylist()
        return sum(span["end"] - span["start"] for [span] in spans)


class CompletionWriter:
    """Generates the completions of a part; they depend only on the part, its number and the options.

    Parameters
    ----------
    batching
        The prompts that share a batch: any, those of one length, or none.
    reader
        Reads the activations of the generation, if they are captured.
    chat
        Options of the chat template.
    special_tokens
        Special tokens in front of prompts that are texts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        generation: Generation,
        batching: Batching = "padded",
        reader: ActivationReader | None = None,
        chat: ChatOptions | None = None,
        special_tokens: SpecialTokens = "auto",
    ) -> None:
        self._model, self._tokenizer, self._generation = model, tokenizer, generation
        self._batching, self._reader = batching, reader
        self._chat, self._special_tokens = chat or ChatOptions(), special_tokens
        if self._chat.add_generation_prompt is None:
            self._chat = self._chat.model_copy(update={"add_generation_prompt": True})
        self._pad = pad_token_id(model, tokenizer)
        self._most = longest_input(model, tokenizer)

    def table(self, part: pa.Table, number: int, activations: Path | None = None) -> pa.Table:
        """Return a part of the corpus with completions, and write their activations to a file, if they are captured."""
        prompts = self._prompts(part)
        made: dict[int, list[int]] = {}
        order = sorted(range(len(prompts)), key=lambda line: len(prompts[line]))
        lengths = [len(prompts[line]) for line in order]
        groups = batch_groups(self._batching, np.array(lengths)[:, None])
        most = self._generation.batch
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            if self._reader is not None and activations is not None:
                room = [len(prompt) + self._generation.max_new_tokens for prompt in prompts]
                stack.enter_context(self._reader.open_file(activations, room))
            for first, last in parts([1] * len(order), most, None if groups is None else groups.tolist()):
                lines = order[first:last]
                torch.manual_seed(xxhash.xxh3_64_intdigest(f"{self._generation.seed} {number} {first}".encode()) >> 1)
                made |= dict(zip(lines, self._complete([prompts[line] for line in lines], lines), strict=True))
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
            check_template(self._tokenizer, self._chat)
            rendered = [
                render_text(self._tokenizer, unpack_messages(chat), name, self._chat)
                for name, chat in zip(part.column("id").to_pylist(), part.column(1).to_pylist())
            ]
            prompts = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        else:
            prompts = self._open_texts(part.column(1).to_pylist())
        room = None if self._most is None else self._most - self._generation.max_new_tokens
        for name, prompt in zip(part.column("id").to_pylist(), prompts):
            if not prompt or (room is not None and len(prompt) > room):
                raise DocumentsError(
                    "a prompt cannot be completed",
                    where=f"document {name!r}",
                    expected=f"1 to {room} tokens, so that {self._generation.max_new_tokens} more fit into the model",
                    found=f"{len(prompt)} tokens",
                    remedy="shorten the prompt, or max_new_tokens",
                )
        return [list(prompt) for prompt in prompts]

    def _open_texts(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of texts, without the end-of-text token, if the tokenizer adds one."""
        special = self._special_tokens != "never"
        prompts = list(self._tokenizer(texts, add_special_tokens=special)["input_ids"])
        if not special:
            return prompts
        if self._special_tokens == "auto":
            around = added_tokens(self._tokenizer)
            prompts = [prompt[around.count_doubled(prompt)[0] :] for prompt in prompts]
        end, added = self._tokenizer.eos_token_id, self._tokenizer("")["input_ids"]
        closed = len(added) > 0 and added[-1] == end and (len(added) > 1 or end != self._tokenizer.bos_token_id)
        return [prompt[:-1] for prompt in prompts] if closed else prompts

    def _complete(self, prompts: list[list[int]], lines: list[int]) -> list[list[int]]:
        from transformers import GenerationConfig

        options = self._generation
        width = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        device = input_device(self._model)
        drawn = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k or 0}
        settings: dict[str, Any] = {
            "max_new_tokens": options.max_new_tokens,
            "num_return_sequences": 1,
            "do_sample": options.temperature > 0,
            "eos_token_id": sorted(self._ends) or None,
            "pad_token_id": self._pad,
            **(drawn if options.temperature > 0 else {}),
        }
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        with torch.no_grad(), _translated(len(prompts), width):
            if self._reader is None:
                out = self._model.generate(**inputs, generation_config=GenerationConfig(**settings))
            else:
                with self._reader.follow_batch(lines, [width - len(prompt) for prompt in prompts]):
                    out = self._read_steps(inputs, settings)
        return [self._until_end(line) for line in out[:, width:].cpu().numpy()]

    def _read_steps(self, inputs: dict[str, torch.Tensor], settings: dict[str, Any]) -> torch.Tensor:
        """Return what the model generates, after one more step, in which it reads the last tokens."""
        from transformers import GenerationConfig

        assert self._reader is not None
        settings |= {"use_cache": True, "cache_implementation": "dynamic", "disable_compile": True}
        kept = GenerationConfig(**settings, return_dict_in_generate=True)
        made = self._model.generate(**inputs, generation_config=kept)
        tokens: torch.Tensor = made.sequences
        new = torch.ones_like(tokens[:, inputs["input_ids"].shape[1] :])
        self._reader.begin_last_step(tokens.shape[1] - 1)
        last = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=self._pad, disable_compile=True)
        self._model.generate(
            input_ids=tokens,
            attention_mask=torch.cat([inputs["attention_mask"], new], 1),
            past_key_values=made.past_key_values,
            generation_config=last,
        )
        return tokens

    def _until_end(self, tokens: np.ndarray) -> list[int]:
        """Return the tokens up to and including the one that ends the completion; the rest is padding."""
        ends = np.flatnonzero(np.isin(tokens, list(self._ends)))
        return [int(token) for token in (tokens[: ends[0] + 1] if len(ends) else tokens)]


@contextmanager
def _translated(prompts: int, longest: int) -> Iterator[None]:
    """Raise CaptureError for an error of transformers while it completes prompts."""
    try:
        yield
    except FAILURES as error:
        raise CaptureError(
            "the model fails while it completes prompts",
            expected=f"completions of {prompts} prompts of up to {longest} tokens",
            found=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
            remedy="lower generate.batch if memory is short; leave settings out of model.generation_config that this"
            " does not support, such as prompt_lookup_num_tokens",
        ) from error


def check_generates(model: Any) -> None:
    """Raise ConfigError if a model cannot generate."""
    if not hasattr(model, "generate") or not getattr(model, "can_generate", lambda: False)():
        raise ConfigError(
            "the model cannot generate",
            expected="a causal language model of transformers",
            found=type(model).__name__,
            remedy="load it with loader: AutoModelForCausalLM",
        )


def prompt_parts(corpus: Documents) -> Iterator[pa.Table]:
    """Yield the documents of a corpus in tables of `PART` documents."""
    held: list[pa.Table] = []
    for batch in corpus.batches():
        held.append(pa.Table.from_batches([batch]))
        while sum(map(len, held)) >= PART:
            table = pa.concat_tables(held, promote_options="permissive")
            yield table.slice(0, PART)
            held = [table.slice(PART)]
    if sum(map(len, held)):
        yield pa.concat_tables(held, promote_options="permissive")
