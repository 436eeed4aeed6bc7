"""Options that turn documents into sequences and rows, as a configuration and a store hold them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, WithJsonSchema, model_serializer
from pydantic.json_schema import SkipJsonSchema

from flexcache.chat_options import ChatOptions
from flexcache.errors import ConfigError
from flexcache.validation import Options

RowSelection = Literal["all", "last", "first", "mean", "some"]
"""The tokens that become rows; ``some`` stands for those of a `Choice`."""
WORDS = ("all", "last", "first", "mean")
SpecialTokens = Literal["auto", "always", "never"]
"""The special tokens of a tokenizer around a text: those that the text lacks, all of them, or none."""
Phase = Literal["prefill", "decode"]
"""Forward that computed the activations of a token: that of the whole prompt, or a step of the generation."""


class Windows(Options):
    """Cut long documents into overlapping windows; each token is stored from the first window that contains it.

    >>> Windows(length=1024, stride=512).sizes(max_length=2048)
    (1024, 512)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    length: int | None = Field(None, ge=1, description="tokens of a window; max_length by default")
    stride: int | None = Field(
        None, ge=1, description="tokens from the start of a window to the start of the next; length by default"
    )

    def sizes(self, max_length: int | None) -> tuple[int, int]:
        """Return length and stride in tokens.

        Raises
        ------
        ConfigError
            No length is known, the length exceeds *max_length*, or the stride would skip tokens.
        """
        length = self.length or max_length
        if length is None:
            raise ConfigError("windows need a length", remedy="give the number of tokens: windows: {length: 1024}")
        length = _within(length, max_length)
        stride = self.stride or length
        if stride > length:
            raise ConfigError(
                "the stride of windows leaves tokens out", expected=f"at most the length, {length}", found=str(stride)
            )
        return length, stride


class Packing(Options):
    """Concatenate documents into sequences of one length, as in pretraining.

    >>> Packing(length=1024).size(max_length=2048)
    1024
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    length: int | None = Field(None, ge=4, description="tokens of a sequence; max_length by default")
    separator: int | Literal["eos", "bos"] | None = Field(
        "eos", description="token between two documents: eos, bos, a token id, or null for none"
    )
    bos: int | Literal["auto", "bos"] | None = Field(
        "auto",
        description="token in front of each sequence: bos, a token id, null for none, or auto for bos where the"
        " tokenizer adds one to texts",
    )
    isolate: bool = Field(
        False, description="restrict attention to each document and restart its positions (block-diagonal attention)"
    )

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit options that are newer than some stores, so that the spec of an older store stays equal."""
        content: dict[str, Any] = handler(self)
        return {name: value for name, value in content.items() if name != "isolate" or value}

    def size(self, max_length: int | None) -> int:
        """Return the length in tokens.

        Raises
        ------
        ConfigError
            No length is known, or it exceeds *max_length*.
        """
        length = self.length or max_length
        if length is None:
            raise ConfigError("packing needs a length", remedy="give the number of tokens: packing: {length: 1024}")
        return _within(length, max_length)


class Choice(Options):
    """Rules that choose tokens; a token is chosen if every given rule chooses it.

    The rules are applied in the order of the fields: *every* counts the tokens that the rules before it have left.

    >>> Choice(roles=("assistant",), every=4).columns
    ()
    >>> Choice(mask="keep").columns
    ('keep',)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    specials: bool = Field(True, description="keep the special tokens of the tokenizer")
    character_spans: str | None = Field(
        None, description="column with lists of {start, end}, in characters of the text"
    )
    token_spans: str | None = Field(None, description="column with lists of {start, end}, in tokens of the document")
    roles: tuple[str, ...] | None = Field(None, description="for chats: roles whose messages are kept")
    turns: tuple[int, ...] | None = Field(
        None, description="for chats: numbers of the messages that are kept; negative numbers count from the end"
    )
    parts: tuple[Literal["content", "reasoning", "tool_call", "tool_result", "template"], ...] | None = Field(
        None, description="for chats: parts of the messages that are kept; template is what the chat template adds"
    )
    mask: str | None = Field(None, description="column with lists of true and false, one value for each token")
    phases: tuple[Phase, ...] | None = Field(
        None, description="with generate.capture: tokens that were read as a prompt (prefill), or generated (decode)"
    )
    every: int | None = Field(None, ge=1, description="keep the first token and every n-th after it")
    fraction: float | None = Field(None, gt=0, le=1, description="keep each token with this probability")
    seed: int = Field(0, ge=0, description="seed of fraction; the draw of a document depends on its id")

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit rules that are newer than some stores, so that the spec of an older store stays equal."""
        content: dict[str, Any] = handler(self)
        newer = ("parts", "phases")
        return {name: value for name, value in content.items() if name not in newer or value is not None}

    @property
    def of_messages(self) -> bool:
        """True if a rule needs chats."""
        return any(rule is not None for rule in (self.roles, self.turns, self.parts))

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the documents that the rules read."""
        return tuple(name for name in (self.character_spans, self.token_spans, self.mask) if name)


class Generation(Options):
    """Completions that a model generates for the documents, and captures with them.

    >>> Generation(max_new_tokens=64, temperature=0.7).batch
    16
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(ge=1, description="tokens of a completion, at most")
    temperature: float = Field(0.0, ge=0, description="sampling temperature; 0 takes the most likely token")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the most likely tokens of this total probability")
    top_k: int | None = Field(None, ge=1, description="sample from this number of most likely tokens")
    seed: int = Field(0, ge=0, description="seed of the sampling")
    batch: int = Field(16, ge=1, description="prompts in a batch")
    capture: bool = Field(
        False,
        description="store the activations of the generation itself, instead of running prompt and completion again",
    )

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit options that are newer than some completions, so that those are continued."""
        content: dict[str, Any] = handler(self)
        return {name: value for name, value in content.items() if name != "capture" or value}


DecoderInputMode = Literal["shifted", "as_given"]
"""Teacher forcing: the decoder inputs are the target shifted right, behind a start token, or the target as given."""


class DecoderInputs(Options):
    """Decoder inputs that an encoder-decoder model receives for the target of a document."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: DecoderInputMode = Field("shifted", description="the target shifted right (shifted), or as_given")
    start: int | Literal["last"] | None = Field(
        None,
        description="what precedes a shifted target: a token id, or last for the last token of the target, as in mBART",
    )


class SequenceOptions(Options):
    """Options that, with a tokenizer, determine the sequences of a corpus and their rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: Annotated[
        RowSelection,
        WithJsonSchema({"anyOf": [{"enum": list(WORDS)}, {"type": "object"}]}),
    ] = Field(
        "all",
        description="tokens that become rows: all, last, first, or mean of a document; or rules such as {every: 4}, see"
        " `flexcache.Choice`, with take for the part of the chosen tokens that is kept",
    )
    choice: SkipJsonSchema[Choice | None] = Field(
        None, description="tokens to which rows applies: all, the last, the first, or the mean of the chosen tokens"
    )
    max_length: int | None = Field(
        None, ge=1, description="tokens after which a document is truncated; the longest input of the model by default"
    )
    windows: Windows | None = Field(None, description="cut long documents into windows instead of truncating them")
    max_tokens: int | None = Field(
        None, ge=1, description="tokens of all documents together; the document that reaches this number is the last"
    )
    packing: Packing | None = Field(None, description="concatenate documents into sequences of one length")
    special_tokens: SpecialTokens = Field(
        "auto",
        description="special tokens that the tokenizer adds to texts: those that the text does not begin or end with"
        " itself (auto), always, or never",
    )
    chat: ChatOptions | None = Field(None, description="options of the chat template, for documents of messages")
    token_labels: tuple[str, ...] = Field((), description="label columns with a value, or spans, for single tokens")
    generate: Generation | None = Field(
        None, description="complete the documents with the model, and capture prompts with completions"
    )
    decoder: SkipJsonSchema[DecoderInputs | None] = Field(
        None, description="decoder inputs of an encoder-decoder model, resolved for the model"
    )

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit options that change no stored value or are newer than some stores, so that older specs stay equal.

        Completions that are run again are documents like others; the store describes those.
        """
        content: dict[str, Any] = handler(self)
        newer: dict[str, list[Any]] = {"decoder": [None], "special_tokens": ["auto"], "chat": [None, {}]}
        newer |= {"keep": [None], "keep_dtype": ["stored"]}
        if (segment := type(self).model_fields.get("segment_tokens")) is not None:
            newer["segment_tokens"] = [segment.default]
        newer |= {} if self.decoding else {"generate": [content.get("generate")]}
        return {name: value for name, value in content.items() if value not in newer.get(name, [])}

    @property
    def decoding(self) -> bool:
        """True if the activations are read while the completions are generated."""
        return self.generate is not None and self.generate.capture

    @property
    def whole(self) -> bool:
        """True if each document is one sequence, truncated if it is too long."""
        return self.windows is None and self.packing is None

    @property
    def isolated(self) -> bool:
        """True if documents share sequences without attending to each other."""
        return self.packing is not None and self.packing.isolate

    def within(self, longest: int | None) -> Self:
        """Return the options with `max_length` set to *longest* tokens if it is not given."""
        return self if self.max_length else self.model_copy(update={"max_length": longest})

    def check_images(self) -> None:
        """Raise ConfigError for options that cannot apply to images: an image is one sequence of fixed length."""
        choice = self.choice
        asked = {
            "windows": self.windows is not None,
            "packing": self.packing is not None,
            "special_tokens": self.special_tokens != "auto",
            "chat": self.chat is not None,
            "max_length": self.max_length is not None,
            "rows by roles, turns or parts": choice is not None and choice.of_messages,
            "rows by character_spans": choice is not None and choice.character_spans is not None,
        }
        wrong = [name for name, given in asked.items() if given]
        if wrong:
            raise ConfigError(
                f"{' and '.join(wrong)} {'are' if len(wrong) > 1 else 'is'} for texts, and the documents are images",
                expected="each image as one sequence of all its tokens; rows by specials, token_spans, mask, every or"
                " fraction",
                remedy="leave it out",
            )

    def check(self) -> None:
        """Raise ConfigError if options contradict each other."""
        if self.decoder is not None:
            self._check_decoder()
        if self.decoding and not self.whole:
            raise ConfigError(
                "each document that is captured while it is generated is one sequence",
                where="generate.capture",
                expected="neither windows nor packing",
                found="windows" if self.windows is not None else "packing",
                remedy="leave it out, or set generate.capture to false",
            )
        if self.choice is not None and self.choice.phases is not None and not self.decoding:
            raise ConfigError(
                "rows are chosen by phases, but nothing is captured while it is generated",
                expected="generate with capture: true",
                remedy="choose completions by {token_spans: generated}",
            )
        if self.packing is not None:
            self.packing.size(self.max_length)
            if self.packing.isolate and self.packing.separator not in ("eos", None):
                raise ConfigError(
                    "isolated documents have no separator, since no token would attend to it",
                    expected="packing without separator",
                    found=str(self.packing.separator),
                    remedy="leave it out; the opening token, bos, is then in front of each document",
                )
            if self.windows is not None or self.rows != "all":
                raise ConfigError(
                    "packed documents have no windows, and all of their tokens are rows",
                    expected="packing with rows: all, and without windows",
                    found=f"rows: {self.rows}" if self.windows is None else "windows",
                    remedy="select rows when you read the store, or leave packing out",
                )
        if self.windows is not None:
            self.windows.sizes(self.max_length)
            if self.rows == "mean":
                raise ConfigError(
                    "the mean over a document needs the document in one sequence, and windows make several of it",
                    remedy="leave windows out, or keep rows: all and take means afterwards",
                )

    def _check_decoder(self) -> None:
        if not self.whole:
            raise ConfigError(
                "a document with a target is one sequence: a decoder attends to everything that its encoder reads",
                expected="neither windows nor packing",
                found="windows" if self.windows is not None else "packing",
                remedy="leave it out; longer inputs and targets are truncated to max_length",
            )
        if "context" in self.token_labels:
            raise ConfigError(
                "token labels cannot be called 'context': sequences.parquet has the encoder inputs under that name",
                remedy="rename the column",
            )


def parse_rows(rows: Any) -> dict[str, Any]:
    """Return ``rows`` and ``choice`` of `SequenceOptions` from the form that a user writes.

    That form is a word, or the rules of a `Choice` as a mapping, with ``take`` for the part of the chosen tokens that
    is kept: all (the default), the last, the first, or the mean of each document.

    >>> parse_rows({"every": 4, "take": "last"})
    {'rows': 'last', 'choice': {'every': 4}}

    Raises
    ------
    ConfigError
        *rows* has another form. Errors within the rules are left to `flexcache.validation.validate`.
    """
    if isinstance(rows, str):
        if rows not in WORDS:
            raise _bad_rows(rows)
        return {"rows": rows, "choice": None}
    if isinstance(rows, Choice):
        return {"rows": "some", "choice": rows.model_dump()}
    if not isinstance(rows, dict):
        raise _bad_rows(rows)
    rules = {name: value for name, value in rows.items() if name != "take"}
    take = rows.get("take", "all")
    if take not in WORDS:
        raise ConfigError(f"rows cannot take {take!r}", expected=", ".join(WORDS))
    if not rules:
        return {"rows": take, "choice": None}
    return {"rows": "some" if take == "all" else take, "choice": rules}


def _bad_rows(rows: Any) -> ConfigError:
    return ConfigError(
        "key 'rows' has a value that cannot be used",
        expected=f"{', '.join(WORDS)}, or a mapping of rules such as {{every: 4}}",
        found=repr(rows),
    )


def _within(length: int, max_length: int | None) -> int:
    if max_length is not None and length > max_length:
        raise ConfigError(
            "sequences would be longer than max_length or than the model can read",
            expected=f"at most {max_length} tokens",
            found=str(length),
        )
    return length
