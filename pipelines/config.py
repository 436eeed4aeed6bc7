"""Configuration files: YAML, checked whole before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from flexcache.documents import CSV_NULLS, Documents, load_dataset, open_documents
from flexcache.errors import ConfigError
from flexcache.model import ModelSource
from flexcache.options import Choice, DecoderInputMode, Generation, Options, Packing, Windows, parse_rows
from flexcache.paths import local_path
from flexcache.provenance import load
from flexcache.recording.forward.transform import Transform
from flexcache.spec import AnyDType, Spec, parse_sites, validate
from flexcache.store.storage.location import StoreLocation, is_location, local, parse_location
from flexcache.store.write.worker import HEARTBEAT_TIMEOUT


class DocumentsSource(Options):
    """Where the corpus is, and which of its columns are what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | list[str] | None = Field(
        None, description="Parquet, JSONL, CSV, a folder of .txt or of images, a glob, or several"
    )
    dataset: str | None = Field(None, description="in place of a path: a dataset of the hub, or a folder of one")
    config: str | None = Field(None, description="of the dataset")
    split: str = Field("train", description="of the dataset")
    revision: str | None = Field(None, description="of the dataset")
    streaming: bool = Field(False, description="read the dataset as it comes, without loading it to the disk first")
    format: Literal["parquet", "jsonl", "csv", "txt", "image"] | None = None
    id: str = "id"
    text: str | None = Field("text", description="the column of texts; null for one that is not to be read")
    tokens: str | None = Field("tokens", description="of token ids, or null")
    messages: str | None = Field("messages", description="of chats, or null")
    image: str | None = Field(
        "image", description="of encoded images, or paths relative to the file that names them; or null"
    )
    labels: list[str] | None = Field(None, description="label columns to keep; all where not given")
    csv_nulls: list[str] = Field(list(CSV_NULLS), description="fields of CSV files that are null in labels")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ConfigError(
                "key 'documents' must say one place", expected="path or dataset", found=str(self.path or "neither")
            )
        return self

    def open(self) -> Documents:
        """Open the corpus."""
        source: Any = self.path
        if self.dataset is not None:
            options = {name: getattr(self, name) for name in ("config", "split", "revision", "streaming")}
            source = load_dataset(self.dataset, **options)
        return open_documents(
            source,
            format=self.format,
            id=self.id,
            text=self.text,
            tokens=self.tokens,
            messages=self.messages,
            image=self.image,
            labels=self.labels,
            csv_nulls=self.csv_nulls,
        )


class TransformSource(Options):
    """A function of an activation whose result is stored; see `flexcache.Transform`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    site: str = Field(description="a site, or pattern: attention probabilities, with model.attention: eager")
    function: str = Field(description="package.module:attribute; a torch module is moved to the model's device")
    layers: Any = "all"
    batch: bool = Field(False, description="give the function the batch as well: token ids and lengths")

    def load(self, device: Any = None) -> Transform:
        """Import the function."""
        function = imported(self.function, f"transform {self.name}")
        if device is not None and hasattr(function, "eval") and hasattr(function, "to"):
            function = function.to(device).eval()
        return Transform(self.name, self.site, function, self.layers, self.batch)


class ObjectiveSource(Options):
    """A scalar of the model's output, whose gradients are stored at sites that end in .grad. One of its keys is set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    logit_difference: tuple[int | str, int | str] | None = Field(
        None, description="two tokens, by id or as text: the logit of the first less that of the second"
    )
    function: str | None = Field(None, description="package.module:attribute, of the output and the batch")

    def load(self, tokenizer: Any) -> Any:
        """Return the objective; the text of a token is looked up in the tokenizer.

        Raises
        ------
        ConfigError
            A text is not one token, or not exactly one of the keys is set.
        """
        from flexcache.recording.arguments import one_token
        from flexcache.recording.forward.objective import LogitDifference

        if (self.function is None) == (self.logit_difference is None):
            raise ConfigError("objective must say one thing", expected="logit_difference or function")
        if self.function is not None:
            return imported(self.function, "objective")
        assert self.logit_difference is not None
        token, other = (one_token(value, tokenizer) for value in self.logit_difference)
        return LogitDifference(token, other)


def imported(path: str, where: str) -> Any:
    """Return what ``package.module:attribute`` names, importable from the current folder too."""
    folder = str(Path.cwd())
    if folder not in sys.path:  # as `python -m` would have it
        sys.path.insert(0, folder)
    return load(path, where)


def _objective(value: Any) -> Any:
    return {} if value is None or value == "next_token_loss" else value


def model_or_name(value: Any) -> Any:
    """Return the long form of a model that was given by its name alone."""
    return {"name": value} if isinstance(value, str) else value


def _rows(value: Any) -> Any:
    rules = parse_rows(value)["choice"]  # a mistake shows before anything is loaded
    if rules is not None:
        validate(Choice, rules, "rows")
    return value


def _documents(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | list) else value


def _store(value: Any) -> StoreLocation:
    if not is_location(value) or isinstance(value, bytes) or not str(value):
        raise ValueError("a path or a URL is expected")
    return parse_location(value)


class CaptureConfig(Options):
    """What `flexcache capture` reads. Paths are relative to the folder in which the command runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Annotated[ModelSource, BeforeValidator(model_or_name)]
    documents: Annotated[DocumentsSource, BeforeValidator(_documents)]
    generate: Generation | None = Field(None, description="complete the documents first, and capture both")
    store: Annotated[Any, BeforeValidator(_store)] = Field(
        description="the store to make or to go on with, such as run.zarr or s3://bucket/run.zarr"
    )
    sites: Any = Field(None, description="a site, a list, or a mapping from site to layers")
    layers: Any = "all"
    transforms: list[TransformSource] = Field([], description="functions of activations whose results are stored")
    objective: Annotated[ObjectiveSource, BeforeValidator(_objective)] = Field(
        ObjectiveSource(), description="what .grad sites are gradients of: next_token_loss, logit_difference, function"
    )
    rows: Annotated[Any, BeforeValidator(_rows)] = Field(
        "all", description="all, last, first, mean, or rules; see `flexcache.Choice`"
    )
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32", "int8"], AnyDType] = "auto"
    max_length: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, description="of all documents: the one that reaches it is the last")
    windows: Windows | None = Field(None, description="long documents in windows, in place of truncation")
    packing: Packing | None = Field(None, description="documents one after the other in sequences of one length")
    token_labels: list[str] = Field([], description="label columns with an entry, or spans, for tokens")
    decoder_inputs: DecoderInputMode = Field(
        "shifted", description="with side: decoder, how it reads targets: or as_given"
    )
    batch_tokens: int = Field(4096, ge=1)
    seed: int = Field(0, ge=0)
    compression: Literal["none", "zstd"] = "none"
    keep_text: bool = True
    empty_documents: Literal["error", "skip"] = "error"
    buffer_mb: int = Field(256, ge=1, description="bound on the memory for rows on their way to the disk")
    heartbeat_timeout: float = Field(
        HEARTBEAT_TIMEOUT,
        gt=0,
        description="seconds without a sign of life after which a process elsewhere counts as gone",
    )
    threads: int | None = Field(None, ge=1, description="intra-op threads of torch on a CPU")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.generate is not None and self.model.side == "decoder":
            raise ConfigError(
                "generate completes documents, and has no targets for a decoder beside its encoder",
                expected="documents with a target, without generate",
                remedy="make targets with the model's own generate(), and give them as target_tokens with"
                " decoder_inputs: as_given",
            )
        return self

    def capture_options(self) -> dict[str, Any]:
        """Return the options of `flexcache.capture` that the file sets and that need no model."""
        names = ("sites", "layers", "rows", "dtype", "max_length", "max_tokens", "windows", "packing", "token_labels")
        options = {
            name: getattr(self, name)
            for name in (
                *names,
                "decoder_inputs",
                "batch_tokens",
                "seed",
                "compression",
                "keep_text",
                "empty_documents",
            )
        }
        if self.sites is None:
            options["sites"] = [] if self.transforms else "resid_post"
        return options

    def skeleton(self) -> Any:
        """Return the model without weights.

        Raises
        ------
        ConfigError
            It has an encoder and a decoder, and the file does not say which is meant.
        """
        from flexcache.hooks.locate.encoder_decoder import is_encoder_decoder

        skeleton = self.model.skeleton()
        if self.model.side is None and is_encoder_decoder(skeleton):
            raise ConfigError(
                "the model has an encoder and a decoder",
                where=f"model.name: {self.model.name}",
                expected="model.side: encoder, or decoder for documents with a target",
                remedy=f"write model: {{name: {self.model.name}, side: encoder}}",
            )
        return skeleton

    def load_model(self) -> Any:
        """Return the model with its weights; torch uses as many threads as the file says from then on."""
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        return self.model.load()

    @property
    def completions(self) -> Path:
        """The folder of what `generate` makes, beside the store."""
        store = local(self.store, "generate", remedy="generate beside a store in a folder, and copy that")
        return store.with_name(f"{store.name}.completions")

    def open_documents(self) -> Documents:
        """Open the corpus: with `generate`, the completions, once they are made.

        Raises
        ------
        DocumentsError
        """
        if self.generate is None:
            return self.documents.open()
        from flexcache.recording.generate import Completions

        return Completions(self.completions).open()

    def load_tokenizer(self, documents: Documents) -> Any:
        """Return the model's tokenizer, of images its processor, or None where the documents have tokens already."""
        if documents.content == "image":
            return self.model.processor()
        plain = documents.content == "tokens" and self.generate is None
        if self.model.side == "decoder":
            plain = plain and "target_tokens" in documents.labels
        return None if plain else self.model.tokenizer()

    def functions(self, tokenizer: Any, device: Any = None) -> dict[str, Any]:
        """Return the options of `flexcache.capture` that are functions."""
        nothing = self.objective == ObjectiveSource()
        return {
            "transforms": tuple(transform.load(device) for transform in self.transforms),
            "objective": None if nothing else self.objective.load(tokenizer),
        }

    def spec(self, skeleton: Any = None) -> Spec:
        """Return the same as `capture_options`, as the store keeps it; what a decoder reads is said with a model."""
        from flexcache.recording.forward.decoder_inputs import infer_decoder_inputs

        options = self.capture_options()
        mode = options.pop("decoder_inputs")
        options["decoder"] = None if skeleton is None else infer_decoder_inputs(skeleton, mode)
        sites = parse_sites(options.pop("sites"), options.pop("layers"), optional=bool(self.transforms))
        return validate(Spec, {"sites": sites, **options, **parse_rows(options["rows"])}, str(self.store))


def read_config(path: Path, changes: Sequence[str] = ()) -> CaptureConfig:
    """Read a configuration file, with changes such as ``batch_tokens=2048`` or ``model.dtype=float32``.

    Raises
    ------
    ConfigError
        The file or a change cannot be read, or a key or value is wrong.
    """
    return validate(CaptureConfig, read_yaml(path, changes, "store: run.zarr"), str(path))


def read_yaml(path: Path, changes: Sequence[str], line: str) -> dict[str, Any]:
    """Return a file of keys and values, with changes; *line* is an example for who writes something else.

    Raises
    ------
    ConfigError
    """
    try:
        data = yaml.safe_load(local_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"configuration {path} cannot be read", found=error.strerror, remedy="check the path"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} is not YAML", found=" ".join(str(error).split())) from error
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"configuration {path} is not a mapping", expected=f"lines such as  {line}", found=repr(data)[:80]
        )
    content = dict(data)
    for change in changes:
        _apply(content, change)
    return content


def _apply(content: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise ConfigError(f"change {change!r} cannot be read", expected="key=value, for example batch_tokens=2048")
    *parents, last = key.split(".")
    place = content
    for name in parents:
        inner = place.get(name, {})
        if isinstance(inner, str | list):  # the short form of model or documents
            inner = {"name" if name == "model" else "path": inner}
        place[name] = dict(inner)
        place = place[name]
    place[last] = yaml.safe_load(text)
