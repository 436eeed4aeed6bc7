"""How documents become sequences and rows: the options of it, as a configuration and a store have them."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)
from pydantic_core import PydanticCustomError

from flexcache.errors import ConfigError

RowSelection = Literal["all", "last", "first", "mean", "some"]
"""Which tokens are rows; ``some`` is those of a `Choice`."""
WORDS = ("all", "last", "first", "mean")


class Options(BaseModel):
    """Base of all options: true and false are not numbers, as they are in Python.

    >>> Windows(length=True)
    Traceback (most recent call last):
    ...
    pydantic_core._pydantic_core.ValidationError: 1 validation error for Windows
    length
      a number, not true or false [type=boolean, input_value=True, input_type=bool]
    """

    @field_validator("*", mode="before")
    @classmethod
    def _check_no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        given = value if isinstance(value, list | tuple | set) else (value,)
        if kinds & {int, float} and bool not in kinds and any(isinstance(item, bool) for item in given):
            raise PydanticCustomError("boolean", "a number, not true or false")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """Return an annotation and those inside it, such as the members of a union."""
    return {annotation}.union(*map(_kinds, get_args(annotation))) if annotation.__hash__ else set()


class Windows(Options):
    """Long documents cut into windows that overlap; the first window that sees a token keeps its row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    length: int | None = Field(None, ge=1, description="tokens of a window; by default max_length")
    stride: int | None = Field(
        None, ge=1, description="tokens from one window's start to the next's; by default length"
    )

    def sizes(self, max_length: int | None) -> tuple[int, int]:
        """Return length and stride in tokens.

        Raises
        ------
        ConfigError
            There is no length, it is more than the model reads, or the stride would leave tokens out.
        """
        length = self.length or max_length
        if length is None:
            raise ConfigError("windows need a length", remedy="say how many tokens: windows: {length: 1024}")
        length = _within(length, max_length)
        stride = self.stride or length
        if stride > length:
            raise ConfigError(
                "the stride of windows leaves tokens out", expected=f"at most the length, {length}", found=str(stride)
            )
        return length, stride


class Packing(Options):
    """Documents one after the other in sequences of one length, as models are pretrained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    length: int | None = Field(None, ge=4, description="tokens of a sequence; by default max_length")
    separator: int | Literal["eos", "bos"] | None = Field("eos", description="between two documents; an id, or null")
    bos: int | Literal["auto", "bos"] | None = Field(
        "auto", description="in front of each sequence; auto where the tokenizer puts one in front of texts"
    )
    isolate: bool = Field(
        False, description="attention stays within a document, whose positions begin anew: block-diagonal"
    )

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what stores did not know of when they were made without it."""
        said: dict[str, Any] = handler(self)
        return {name: value for name, value in said.items() if name != "isolate" or value}

    def size(self, max_length: int | None) -> int:
        """Return the length in tokens.

        Raises
        ------
        ConfigError
            There is none, or it is more than the model reads.
        """
        length = self.length or max_length
        if length is None:
            raise ConfigError("packing needs a length", remedy="say how many tokens: packing: {length: 1024}")
        return _within(length, max_length)


class Choice(Options):
    """Rules that choose tokens; a token is chosen where all rules that are given choose it.

    The rules are applied in the order of the fields: *every* counts the tokens that those before it left.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    specials: bool = Field(True, description="false drops the tokenizer's special tokens")
    character_spans: str | None = Field(
        None, description="a column of lists of {start, end}, in characters of the text"
    )
    token_spans: str | None = Field(None, description="a column of lists of {start, end}, in tokens of the document")
    roles: tuple[str, ...] | None = Field(None, description="of a chat: tokens of the messages of these roles")
    turns: tuple[int, ...] | None = Field(None, description="of a chat: those of these messages, negative from the end")
    mask: str | None = Field(None, description="a column of lists of true and false, one for each token")
    every: int | None = Field(None, ge=1, description="the first and every n-th after it")
    fraction: float | None = Field(None, gt=0, le=1, description="each token with this probability")
    seed: int = Field(0, ge=0, description="of the fraction; the draw is the document's own, by its id")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the documents that the rules read."""
        return tuple(name for name in (self.character_spans, self.token_spans, self.mask) if name)


class Generation(Options):
    """Completions that a model makes of the documents before it is captured on both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(0.0, ge=0, description="0 takes the most likely token")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    batch: int = Field(16, ge=1, description="prompts at a time")


DecoderInputMode = Literal["shifted", "as_given"]
"""How a decoder reads a target: one place later, behind the token that it begins with; or exactly as it is given."""


class DecoderInputs(Options):
    """What the decoder of a model with an encoder reads of a document's target."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: DecoderInputMode = "shifted"
    start: int | Literal["last"] | None = Field(
        None, description="what comes before a shifted target: a token id, or its own last token, as in mBART"
    )


class SequenceOptions(Options):
    """What determines the sequences of a corpus and their rows, for a tokenizer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: RowSelection = Field("all", description="which tokens of a document become rows")
    choice: Choice | None = Field(None, description="the tokens that rows are all, the last, the first or the mean of")
    max_length: int | None = Field(None, ge=1, description="tokens of a document after which it is truncated")
    windows: Windows | None = Field(None, description="long documents in windows, in place of truncation")
    max_tokens: int | None = Field(None, ge=1, description="of all documents: the one that reaches it is the last")
    packing: Packing | None = Field(None, description="documents one after the other in sequences of one length")
    token_labels: tuple[str, ...] = Field((), description="columns with a label for each token")
    decoder: DecoderInputs | None = Field(None, description="of a model with an encoder and a decoder: what is read")

    @model_serializer(mode="wrap")
    def _as_before(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what only models with an encoder and a decoder have, so that others say what they always did."""
        said: dict[str, Any] = plain(self)
        return said if self.decoder is not None else {k: v for k, v in said.items() if k != "decoder"}

    @property
    def whole(self) -> bool:
        """Whether each document is one sequence, truncated where it is too long."""
        return self.windows is None and self.packing is None

    @property
    def isolated(self) -> bool:
        """Whether documents share sequences and do not see each other."""
        return self.packing is not None and self.packing.isolate

    def within(self, longest: int | None) -> Self:
        """Return the options for a model that reads at most so many tokens, where max_length is not given."""
        return self if self.max_length else self.model_copy(update={"max_length": longest})

    def check_images(self) -> None:
        """Refuse options that images have no sense for: they are one sequence each, of a number of tokens of its own.

        Raises
        ------
        ConfigError
        """
        choice = self.choice
        asked = {
            "windows": self.windows is not None,
            "packing": self.packing is not None,
            "max_length": self.max_length is not None,
            "rows by roles or turns": choice is not None and (choice.roles is not None or choice.turns is not None),
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
        """Refuse options that contradict each other.

        Raises
        ------
        ConfigError
        """
        if self.decoder is not None:
            self._check_two_sided()
        if self.packing is not None:
            self.packing.size(self.max_length)
            if self.packing.isolate and self.packing.separator not in ("eos", None):
                raise ConfigError(
                    "isolated documents have no separator, since nothing would see it",
                    expected="packing without separator",
                    found=str(self.packing.separator),
                    remedy="leave it out; the opening token, bos, is then in front of each document",
                )
            if self.windows is not None or self.rows != "all":
                raise ConfigError(
                    "packed documents have no windows, and all of their tokens are rows",
                    expected="packing with rows: all, and without windows",
                    found=f"rows: {self.rows}" if self.windows is None else "windows",
                    remedy="choose rows when they are read, or leave packing out",
                )
        if self.windows is not None:
            self.windows.sizes(self.max_length)
            if self.rows == "mean":
                raise ConfigError(
                    "the mean of a document is taken of one sequence, and windows make several of it",
                    remedy="leave windows out, or keep rows: all and take means afterwards",
                )

    def _check_two_sided(self) -> None:
        if not self.whole:
            raise ConfigError(
                "a document with a target is one sequence: a decoder attends to all that its encoder reads",
                expected="neither windows nor packing",
                found="windows" if self.windows is not None else "packing",
                remedy="leave it out; longer sides are truncated to max_length",
            )
        if "context" in self.token_labels:
            raise ConfigError(
                "token labels cannot be called 'context': sequences.parquet has what the encoder reads under that name",
                remedy="rename the column",
            )


def parse_rows(rows: Any) -> dict[str, Any]:
    """Return ``rows`` and ``choice`` of `SequenceOptions` from what a person writes.

    A word, or the rules of a `Choice` as a mapping, with ``take`` for what is kept of the chosen tokens: all (the
    default), the last, the first or the mean of each document.

    Raises
    ------
    ConfigError
        Another form. What is wrong inside of it, `flexcache.spec.validate` says.
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
            "sequences are to be longer than they may be",
            expected=f"at most {max_length} tokens, by max_length or by what the model reads",
            found=str(length),
        )
    return length
