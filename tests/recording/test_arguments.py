"""Arguments of captures: equivalent forms, and clear errors before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import flexcache
from analysis import probes
from flexcache import training
from flexcache.errors import ConfigError, DocumentsError, FlexCacheError, MismatchError, SiteError
from flexcache.hooks.locate.position_tables import count_positions, longest_input
from flexcache.site import resolve_layers
from flexcache.spec import dtype_name
from tests.models import tiny

QUIET: dict[str, Any] = {"progress": False}
DOCS = [{"id": str(i), "tokens": list(range(5, 9 + i)), "label": "ab"[i % 2]} for i in range(6)]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny("llama")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", pad_token="w1")


class OtherNames(torch.nn.Module):
    """A model whose forward has another name for its mask."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Any, mask: Any = None) -> Any:
        return self.model(input_ids=input_ids, attention_mask=mask)


class Bare(torch.nn.Module):
    """A wrapper without a configuration."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


class Failing(Bare):
    """A model that needs more than token ids."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.config = model.config

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        raise ValueError("where are the pictures?")


class Pipeline:
    """An object like a pipeline of transformers."""

    def __init__(self, model: Any) -> None:
        self.model, self.tokenizer = model, None


def empty(model: Any) -> Any:
    with torch.device("meta"):
        return type(model)(model.config)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda model: "no/such-model", "cannot be loaded"),
        (lambda model: Path("no/such-model"), "cannot be loaded"),
        (lambda model: None, "no model"),
        (lambda model: type(model), "a class"),
        (lambda model: model.config, "no model"),
        (Pipeline, "an object that holds a model"),
        (OtherNames, "takes no attention_mask"),
        (Bare, "pass the model inside: model.inner"),
        (empty, "meta device"),
    ],
)
def test_an_argument_that_is_not_a_model_fails_before_any_work(
    made: Callable[[Any], Any], says: str, model: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        flexcache.capture(made(model), None, DOCS, tmp_path / "run.zarr", **QUIET)
    assert not any(tmp_path.iterdir())


def test_a_model_that_does_not_run_on_token_ids_is_referred_to_record(model: Any, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="where are the pictures") as caught:
        flexcache.capture(Failing(model), None, DOCS, tmp_path / "run.zarr", **QUIET)
    assert "flexcache.record" in str(caught.value.remedy)
    assert "example=" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("no/such-tokenizer", "cannot be loaded"),
        (transformers.PreTrainedTokenizerFast, "a class"),
        (3, "not callable"),
        (torch.nn.Linear(2, 2), "a model"),
    ],
)
def test_an_argument_that_is_not_a_tokenizer_fails_before_any_work(
    given: Any, says: str, model: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        flexcache.capture(model, given, [{"text": "w5"}], tmp_path / "run.zarr", **QUIET)
    assert not any(tmp_path.iterdir())


def test_model_and_tokenizer_are_loaded_from_a_folder(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    texts = [{"id": "a", "text": "w5 w6 w7"}]
    folder = str(tmp_path / "checkpoint")
    by_name = flexcache.capture(folder, folder, texts, tmp_path / "named.zarr", **QUIET)
    itself = flexcache.capture(model, tokenizer, texts, tmp_path / "itself.zarr", **QUIET)
    assert by_name.read("resid_post", 1).tobytes() == itself.read("resid_post", 1).tobytes()


@pytest.mark.parametrize(
    "options",
    [
        *({"max_length": value} for value in (0, -1, 2.5)),
        *(
            {"batch_tokens": 0},
            {"max_tokens": 0},
            {"seed": -1},
            {"heartbeat_timeout": 0},
            {"heartbeat_timeout": "long"},
        ),
        *({"buffer_bytes": 0}, {"buffer_bytes": 1.5}, {"model_info": "gpt2"}, {"rows": "Last"}, {"rows": None}),
        *({"sites": value} for value in ([], {}, 3, [None], "resid_psot")),
        *({"layers": value} for value in (None, True, [0.5], "0-1", 99, [])),
        *({"dtype": value} for value in (None, "float", torch.float64)),
        *({"transforms": [3]}, {"token_labels": [3]}, {"objective": "loss"}, {"windows": 8}, {"compression": "zip"}),
        *(
            {name: True}
            for name in ("max_length", "max_tokens", "batch_tokens", "seed", "buffer_bytes", "heartbeat_timeout")
        ),
        *({"rows": {"every": True}}, {"rows": {"turns": [True]}}, {"rows": {"fraction": np.True_}}),
        *({"windows": {"length": True}}, {"packing": {"length": 8, "separator": False}}),
    ],
    ids=str,
)
def test_an_invalid_option_is_one_clear_error(options: dict[str, Any], model: Any, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, SiteError)):
        flexcache.capture(model, None, DOCS, tmp_path / "run.zarr", **options, **QUIET)
    assert not any(tmp_path.iterdir())


def test_numbers_as_text_are_read_as_numbers(model: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_tokens": "4096", "buffer_bytes": "100000000", "heartbeat_timeout": "60", **QUIET}
    store = flexcache.capture(model, None, DOCS, tmp_path / "run.zarr", layers=[0], max_tokens="20", **options)  # type: ignore[arg-type]
    assert store.spec.batch_tokens == 4096
    new = [{"id": "new", "tokens": [5, 6], "label": "a"}]
    grown = flexcache.extend(model, None, new, store.path, max_tokens="1000", **options)  # type: ignore[arg-type]
    assert grown.documents.num_rows == store.documents.num_rows + 1
    for options in ({"batch_tokens": True}, {"max_tokens": True}, {"batch_tokens": "many"}):
        with pytest.raises(ConfigError, match="cannot be used"):
            flexcache.extend(model, None, DOCS, store.path, **options, **QUIET)


def test_equal_options_in_several_forms_give_one_store(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    first = flexcache.capture(model, None, DOCS, path, layers=[0, 1], dtype="bfloat16", max_length=8, **QUIET)
    for layers in ("0,1", "0, 1", np.array([0, 1]), (np.int64(0), np.int64(1)), range(2)):
        for dtype in (torch.bfloat16, "torch.bfloat16"):
            again = flexcache.capture(
                model, None, DOCS, path, layers=layers, dtype=dtype, max_length=np.int64(8), **QUIET
            )
            assert again.spec == first.spec
    with pytest.raises(MismatchError):
        flexcache.capture(model, None, DOCS, path, layers=[0, 1], dtype=np.float32, max_length=8, **QUIET)
    assert [dtype_name(d) for d in (np.float16, np.dtype("float32"), torch.int8)] == ["float16", "float32", "int8"]


def test_layers_take_the_same_forms_everywhere(model: Any, tmp_path: Path) -> None:
    store = flexcache.capture(model, None, DOCS, tmp_path / "run.zarr", **QUIET)
    assert resolve_layers("0,-1", 12) == (0, 11) == resolve_layers([0, -1], 12)
    for layers in ("0,2", [0, 2], np.array([0, 2])):
        assert next(iter(training.stream(store, "resid_post", layers=layers, batch_size=4))).shape == (4, 2, 64)
        swept = probes.sweep(str(store.path), "label", "resid_post", cv=2, layers=layers, progress=False)
        assert swept.results["layer"].values.tolist() == [0, 2]
    assert store.read("resid_post", layer="1").tobytes() == store.read("resid_post", layer=np.int64(1)).tobytes()
    with pytest.raises(SiteError, match="not one layer"):
        store.read("resid_post", layer="0,1")  # type: ignore[arg-type]


def test_a_logit_difference_of_words_equals_that_of_their_token_ids(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    texts: dict[str, Any] = {"documents": [{"id": "a", "text": "w5 w6"}], "sites": ["resid_post.grad"], **QUIET}
    words, ids = flexcache.LogitDifference("w7", "w8"), flexcache.LogitDifference(7, np.int64(8))  # type: ignore[arg-type]
    stores = [
        flexcache.capture(model, tokenizer, path=tmp_path / f"{n}.zarr", objective=one, **texts)
        for n, one in enumerate((words, ids))
    ]
    assert stores[0].spec == stores[1].spec
    for wrong in (flexcache.LogitDifference("w7 w8", "w9"), flexcache.LogitDifference(5000, 1)):
        with pytest.raises(FlexCacheError, match="one token|no logit"):
            flexcache.capture(model, tokenizer, path=tmp_path / "no.zarr", objective=wrong, **texts)


def test_extend_takes_documents_and_path_in_either_order(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    store = flexcache.capture(model, None, DOCS, path, layers=[0], **QUIET)

    def new(number: int) -> list[dict[str, Any]]:
        return [{"id": f"n{number}", "tokens": [5, 6], "label": "a"}]

    flexcache.extend(model, None, new(0), str(path), **QUIET)
    flexcache.extend(model, None, path, new(1), **QUIET)
    flexcache.extend(model, None, path, documents=new(2), **QUIET)  # type: ignore[misc]
    flexcache.extend(model, None, new(3), path=path, **QUIET)
    flexcache.extend(model=model, tokenizer=None, documents=new(4), path=store, **QUIET)  # type: ignore[arg-type]
    flexcache.extend(model, None, (document for document in new(5)), path, **QUIET)
    (tmp_path / "new.jsonl").write_text('{"id": "file", "tokens": [5, 6], "label": "b"}\n')
    flexcache.extend(model, None, tmp_path / "new.jsonl", path, **QUIET)
    grown = flexcache.extend(model, None, str(path), sites="mlp_out", layers="0,1", **QUIET)
    assert grown.documents.num_rows == len(DOCS) + 7
    assert grown.layers("mlp_out") == (0, 1)
    with pytest.raises(ConfigError, match="two stores"):
        flexcache.capture(model, None, DOCS, tmp_path / "other.zarr", layers=[0], **QUIET)
        flexcache.extend(model, None, path, tmp_path / "other.zarr", **QUIET)


SIZES: dict[str, Any] = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
MODELS: dict[str, tuple[Callable[[], Any], bool]] = {
    "GPT-2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0)),
        True,
    ),
    "GPT": (lambda: transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**SIZES)), True),
    "GPT-J": (
        lambda: transformers.GPTJForCausalLM(
            transformers.GPTJConfig(**SIZES, rotary_dim=4, bos_token_id=0, eos_token_id=0)
        ),
        True,
    ),
    "MPT": (
        lambda: transformers.MptForCausalLM(
            transformers.MptConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=4, max_seq_len=32)
        ),
        True,
    ),
    "BLOOM": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
        ),
        False,
    ),
    "Llama": (lambda: tiny("llama"), False),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_document_longer_than_the_model_fails_before_planning(name: str, tmp_path: Path) -> None:
    made, limited = MODELS[name]
    torch.manual_seed(0)
    model = made().eval()
    ids = torch.full((1, 33), 5)
    mask = torch.ones_like(ids)
    assert count_positions(model)[0] == (32 if limited else None)
    long = [{"id": "short", "tokens": [5] * 32}, {"id": "long", "tokens": [5] * 33}]
    options: dict[str, Any] = {"sites": ["resid_post"], "layers": [1], "max_length": 40, **QUIET}
    if not limited:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)  # the model reads it
        flexcache.capture(model, None, long, tmp_path / "run.zarr", **options)
        return
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)  # the reason for the limit
    with pytest.raises(DocumentsError, match="'long' is longer") as caught:
        flexcache.capture(model, None, long, tmp_path / "run.zarr", **options)
    assert "32 tokens" in str(caught.value.expected)
    assert caught.value.found == "33 tokens"
    assert not (tmp_path / "run.zarr").exists()
    with pytest.raises(ConfigError, match="longer than the model can read"):
        flexcache.capture(model, None, long, tmp_path / "run.zarr", **options, windows={"length": 36})
    assert longest_input(model, None) == 32
    whole = flexcache.capture(model, None, long[:1], tmp_path / "run.zarr", **options)
    with pytest.raises(DocumentsError, match="'long' is longer"):
        flexcache.extend(model, None, long[1:], whole.path, **QUIET)
    cut = flexcache.capture(model, None, long, tmp_path / "cut.zarr", **{**options, "max_length": None})
    assert cut.n_rows == 64


def test_record_checks_its_arguments(tmp_path: Path) -> None:
    for sites in (None, {}, ["resid_post"], {"resid_post": (2, 8, 3)}, {"a": 0}):
        with pytest.raises(ConfigError, match="sites"):
            flexcache.record(tmp_path / "run.zarr", DOCS, sites=sites, model="m")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="model"):
        flexcache.record(tmp_path / "run.zarr", DOCS, sites={"a": 8}, model=None)  # type: ignore[arg-type]
    with flexcache.record(
        tmp_path / "run.zarr", DOCS, sites={"resid_post": (4, 8)}, layers="0,2", model="m", dtype=torch.float32
    ) as recorder:
        assert recorder.store.layers("resid_post") == (0, 2)
