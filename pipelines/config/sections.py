"""Sections of configuration files: documents, transforms and the objective."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from flexcache.documents import CSV_NULLS, Documents, load_dataset, open_documents
from flexcache.errors import ConfigError
from flexcache.provenance import import_object
from flexcache.recording.forward.transform import Transform
from flexcache.validation import Options


class DocumentsSource(Options):
    """The location of a corpus, and the roles of its columns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | list[str] | None = Field(
        None, description="Parquet, JSONL, CSV, a folder of .txt files or images, a glob, or a list of these"
    )
    dataset: str | None = Field(
        None, description="instead of a path: a dataset of the Hugging Face hub, or a folder of one"
    )
    config: str | None = Field(None, description="configuration of the dataset")
    split: str = Field("train", description="split of the dataset")
    revision: str | None = Field(None, description="revision of the dataset")
    streaming: bool = Field(False, description="read the dataset as a stream, without storing it on the disk first")
    format: Literal["parquet", "jsonl", "csv", "txt", "image"] | None = Field(
        None, description="format of the files; by their names if not given"
    )
    id: str = Field("id", description="column of ids")
    text: str | None = Field("text", description="column of texts; null to ignore it")
    tokens: str | None = Field("tokens", description="column of lists of token ids; null to ignore it")
    messages: str | None = Field("messages", description="column of chats; null to ignore it")
    image: str | None = Field(
        "image",
        description="column of encoded images, or of paths relative to the file that holds them; null to ignore it",
    )
    labels: list[str] | None = Field(None, description="label columns to keep; all other columns if not given")
    unique_ids: bool = Field(True, description="check that no id occurs twice")
    csv_nulls: list[str] = Field(list(CSV_NULLS), description="fields of CSV files that count as null in labels")

    @model_validator(mode="after")
    def _check_one_place(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ConfigError(
                "key 'documents' must name one place", expected="path or dataset", found=str(self.path or "neither")
            )
        return self

    def open(self) -> Documents:
        """Open the corpus."""
        source: Any = self.path
        if self.dataset is not None:
            options = {name: getattr(self, name) for name in ("config", "split", "revision", "streaming")}
            source = load_dataset(self.dataset, **options)
        columns = ("id", "text", "tokens", "messages", "image", "labels", "unique_ids")
        return open_documents(
            source, format=self.format, csv_nulls=self.csv_nulls, **{name: getattr(self, name) for name in columns}
        )


class TransformSource(Options):
    """A function of an activation whose result is stored; see `flexcache.Transform`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="name of the array in the store")
    site: str = Field(description="a site, or pattern for attention probabilities (needs model.attention: eager)")
    function: str = Field(description="package.module:attribute; a torch module is moved to the device of the model")
    layers: Any = Field("all", description="layers of the site")
    batch: bool = Field(False, description="pass the batch to the function as well: token ids and lengths")

    def load(self, device: Any = None) -> Transform:
        """Import the function and return the transform."""
        function = import_object(self.function, f"transform {self.name}")
        if device is not None and hasattr(function, "eval") and hasattr(function, "to"):
            function = function.to(device).eval()
        return Transform(self.name, self.site, function, self.layers, self.batch)


class ObjectiveSource(Options):
    """The scalar whose gradients are stored at sites that end in .grad; one of the keys is set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    logit_difference: tuple[int | str, int | str] | None = Field(
        None, description="two tokens, by id or as text: the logit of the first minus that of the second"
    )
    function: str | None = Field(None, description="package.module:attribute, a function of the output and the batch")

    def load(self, tokenizer: Any) -> Any:
        """Return the objective; a token given as text is looked up in the tokenizer.

        Raises
        ------
        ConfigError
            A text is not one token, or not exactly one of the keys is set.
        """
        from flexcache.recording.arguments import one_token
        from flexcache.recording.forward.objective import LogitDifference

        if (self.function is None) == (self.logit_difference is None):
            raise ConfigError("objective must set one key", expected="logit_difference or function")
        if self.function is not None:
            return import_object(self.function, "objective")
        assert self.logit_difference is not None
        token, other = (one_token(value, tokenizer) for value in self.logit_difference)
        return LogitDifference(token, other)


def model_or_name(value: Any) -> Any:
    """Return the long form of a model that is given by its name alone."""
    return {"name": value} if isinstance(value, str) else value
