"""The configuration file of captures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from flexcache.documents import Documents
from flexcache.errors import ConfigError
from flexcache.model import ModelSource
from flexcache.recording.run_options import RunOptions
from flexcache.spec import RESOLVED, CaptureSpec
from flexcache.store.storage.location import StoreLocation, is_location, parse_location
from flexcache.validation import unknown_key, validate
from pipelines.config.sections import DocumentsSource, ObjectiveSource, TransformSource, model_or_name
from pipelines.config.yaml_file import read_yaml


def _objective(value: Any) -> Any:
    return {} if value is None or value == "next_token_loss" else value


def _documents(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | list) else value


def _store(value: Any) -> StoreLocation:
    if not is_location(value) or isinstance(value, bytes) or not str(value):
        raise ValueError("a path or a URL")
    return parse_location(value)


class CaptureConfig(CaptureSpec, RunOptions):
    """The configuration of a capture: `CaptureSpec` and `RunOptions`, with model, documents and store.

    Paths are relative to the folder in which the command runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Annotated[ModelSource, BeforeValidator(model_or_name)] = Field(
        description="the model: its folder or name on the hub, or a mapping that says more"
    )
    documents: Annotated[DocumentsSource, BeforeValidator(_documents)] = Field(
        description="the corpus: a path, a list of paths, or a mapping that says more"
    )
    store: Annotated[Any, BeforeValidator(_store), WithJsonSchema({"type": "string"})] = Field(
        description="the store to make or to resume, such as run.zarr or s3://bucket/run.zarr"
    )
    transforms: list[TransformSource] = Field(  # type: ignore[assignment]  # functions, in place of what describes them
        [], description="functions of activations whose results are stored"
    )
    objective: Annotated[ObjectiveSource, BeforeValidator(_objective)] = Field(  # type: ignore[assignment]  # likewise
        ObjectiveSource(),
        description="the scalar of which .grad sites hold gradients: next_token_loss, logit_difference, or function",
    )
    threads: int | None = Field(None, ge=1, description="intra-op threads of torch on a CPU")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the keys that a file can have."""
        return tuple(name for name in cls.model_fields if name not in RESOLVED or name in ("transforms", "objective"))

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        for name in RESOLVED:
            if name not in cls.names() and name in data:
                raise unknown_key(name, cls.names(), "the configuration")
        return data

    @model_validator(mode="after")
    def _check_variants(self) -> Self:
        if self.generate is not None and self.model.adapters is not None:
            raise ConfigError(
                "generate completes documents with one model, and there are several variants",
                expected="model.adapters without generate",
                remedy="make completions with one of them by flexcache.generate, and give their files as documents",
            )
        return self

    @model_validator(mode="after")
    def _check_one_target(self) -> Self:
        if self.generate is not None and self.model.side == "decoder":
            raise ConfigError(
                "generate completes documents, and has no targets for the decoder of an encoder-decoder model",
                expected="documents with a target, without generate",
                remedy="make targets with the model's own generate(), and give them as target_tokens with"
                " decoder_inputs: as_given",
            )
        return self

    def skeleton(self) -> Any:
        """Return the model without weights.

        Raises
        ------
        ConfigError
            The model has an encoder and a decoder, and `model.side` is not given.
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

    def load_model(self, variants: bool = False) -> Any:
        """Return the model with its weights, or its *variants* by name; set the threads of torch if given."""
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        return self.model.load_variants() if variants else self.model.load()

    @property
    def stores(self) -> list[StoreLocation]:
        """The store, or with variants of the model those in the folder that is given as the store."""
        if self.model.adapters is None:
            return [self.store]
        return [self.store / f"{name}.zarr" for name in self.model.adapters]

    def open_documents(self) -> Documents:
        """Open the corpus, or with `generate` the completions.

        Raises
        ------
        DocumentsError
            The corpus cannot be read, or not all completions are made yet.
        """
        if self.generate is None:
            return self.documents.open()
        from flexcache.recording.completions import Completions

        return Completions.of_store(self.store).open()

    def load_tokenizer(self, documents: Documents) -> Any:
        """Return the tokenizer of the model, or its image processor; None if the documents hold tokens already."""
        if documents.content == "image":
            return self.model.processor()
        plain = documents.content == "tokens" and self.generate is None
        if self.model.side == "decoder":
            plain = plain and "target_tokens" in documents.labels
        return None if plain else self.model.tokenizer()

    @property
    def names_functions(self) -> bool:
        """True if the file names functions to import."""
        return bool(self.transforms) or self.objective.function is not None

    def functions(self, tokenizer: Any, device: Any = None) -> dict[str, Any]:
        """Return the arguments of `flexcache.capture` that are functions."""
        default = self.objective == ObjectiveSource()
        return {
            "transforms": tuple(transform.load(device) for transform in self.transforms),
            "objective": None if default else self.objective.load(tokenizer),
        }

    def spec(self, skeleton: Any = None, completed: bool = True) -> CaptureSpec:
        """Return the spec of the capture, without its functions; decoder inputs are resolved if a model is given.

        With `generate`, the documents are chats until they are *completed*.
        """
        from flexcache.recording.forward.decoder_inputs import infer_decoder_inputs

        names = (CaptureSpec.model_fields.keys() & self.model_fields_set) - {"transforms", "objective"}
        if self.generate is not None and completed:  # completions are documents of tokens
            names -= {"chat"}
        spec = validate(CaptureSpec, {name: getattr(self, name) for name in names}, str(self.store), stored=True)
        decoder = None if skeleton is None else infer_decoder_inputs(skeleton, self.decoder_inputs)
        return spec if decoder is None else spec.model_copy(update={"decoder": decoder})

    def run_options(self, **changes: Any) -> RunOptions:
        """Return the options of the run, with some of them changed."""
        options = {name: getattr(self, name) for name in RunOptions.model_fields}
        return validate(RunOptions, options | changes, str(self.store))


def read_config(path: Path, changes: Sequence[str] = ()) -> CaptureConfig:
    """Read a configuration file, with changes such as ``batch_tokens=2048`` or ``model.dtype=float32``.

    Raises
    ------
    ConfigError
        The file or a change cannot be read, or a key or value is wrong.
    """
    return validate(CaptureConfig, read_yaml(path, changes, "store: run.zarr"), str(path))
