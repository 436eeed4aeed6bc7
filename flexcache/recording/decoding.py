"""Capture the activations of a generation: check that it is possible, and write the rows of a store from them."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from flexcache import hooks
from flexcache.documents import Documents
from flexcache.errors import ConfigError, SiteError
from flexcache.hooks.locate.encoder_decoder import is_encoder_decoder
from flexcache.hooks.read.activation_hooks import accepts_keyword
from flexcache.hooks.read.measure import example_inputs
from flexcache.options import Generation
from flexcache.plan import Batching
from flexcache.recording import completions as completions_module
from flexcache.recording.checks.comparison import name_key, relative_differences
from flexcache.recording.checks.padding import (
    EXACT,
    FLOAT32_EPS,
    NEIGHBOURS,
    SMALL,
    Verdict,
    find_batching,
    unit_rounding,
)
from flexcache.recording.completions import Completions, CompletionWriter, check_generates
from flexcache.recording.decoded_activations import (
    ActivationLayout,
    ActivationReader,
    DecodedActivations,
    describe_arrays,
)
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.forward.image_inputs import padding
from flexcache.recording.make_completions import CAPTURE, CONDITIONS, Reading, make_completions
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.recording.run.progress import CaptureProgress
from flexcache.recording.run.recorder import Recorder
from flexcache.spec import CaptureSpec
from flexcache.store.read.selection import ArrayKey
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation

DECODING = "decoding"
"""Key in the fingerprint of units whose rows were read while they were generated."""
SHORT, LONG = 5, 11
"""Tokens of the two prompts of the trial."""
RUN_AGAIN = "leave it out, or set generate.capture to false: prompts and completions are then run again"


@dataclass(frozen=True)
class DecodedCompletions:
    """Completions whose activations were read while they were generated.

    Attributes
    ----------
    documents : Documents
    activations : DecodedActivations
    fingerprint : dict
        The conditions of the generation, which are those of the rows.
    verdict : Verdict or None
        The sequences of a forward that may share a batch; None if the generation was begun earlier.
    """

    documents: Documents
    activations: DecodedActivations
    fingerprint: dict[str, Any]
    verdict: Verdict | None

    def write_rows(self, recorder: Recorder, bars: CaptureProgress) -> None:
        """Fill the pending units of a recorder, and remove the activations when the store is complete."""
        store = recorder.store
        if recorder.pending():
            places = store.documents.column("source_index").to_numpy()
            with recorder:
                bar = bars.capturing(recorder)
                for batch in recorder.batches():
                    documents = places[batch.documents].tolist()
                    for key in recorder.keys:
                        values = [
                            self.activations.read(key, document, len(tokens))
                            for document, tokens in zip(documents, batch.tokens, strict=True)
                        ]
                        recorder.put(key[0], batch.kept(values), rows=batch.rows, layer=key[1])
                    bar.advance()
        if Store(store.path).complete:
            self.activations.remove()


def check_decoding(model: torch.nn.Module, targets: CaptureTargets, alone: bool) -> None:
    """Raise ConfigError if a capture has something that the steps of a generation cannot give."""
    check_generates(model)
    found = {
        "a model with an encoder and a decoder": is_encoder_decoder(model),
        "a model without a cache of keys and values": not accepts_keyword(model, "past_key_values"),
        "a model that is spread over several processes": not alone,
        "transforms": bool(targets.transforms),
        "gradients": targets.objective is not None,
    }
    if wrong := [name for name, given in found.items() if given]:
        raise ConfigError(
            "the activations of a generation cannot be captured here",
            where="generate.capture",
            expected="sites of a causal language model in one process, without transforms and gradients",
            found=", ".join(wrong),
            remedy=RUN_AGAIN,
        )


def capture_completions(
    model: torch.nn.Module,
    tokenizer: Any,
    documents: Documents,
    path: StoreLocation,
    spec: CaptureSpec,
    targets: CaptureTargets,
    group: ModelParallelGroup,
    heartbeat_timeout: float,
    bars: CaptureProgress,
) -> DecodedCompletions:
    """Make the completions of documents next to a store, and read the activations of their generation.

    Raises
    ------
    ConfigError
        A site has no value for each token in a step, or see `check_decoding`. All errors of `flexcache.generate`.
    """
    generation = spec.generate
    assert generation is not None
    check_decoding(model, targets, group.alone)
    hooks.check_sites(model, targets.points, reader=group.read_example, alone=group.alone)
    arrays = describe_arrays(targets.points, hooks.measure(model, targets.points))
    completions = Completions.of_store(path)
    verdict = None
    if completions.request.exists():
        earlier = json.loads(completions.request.read_bytes()).get(CAPTURE, {})
        batching: Batching = earlier.get("batching", "padded")
    else:
        verdict = find_batching(model, targets, padding(model, tokenizer), spec, group)
        batching, because = _prompt_batching(model, tokenizer, targets.points, arrays, verdict)
        if because:
            bars.say(because)
    stored = (path / "zarr.json").exists() and Store(path).complete
    reading = Reading(targets.points, arrays, batching, stored)
    advance = bars.generating(documents.count)
    request = make_completions(
        *(model, tokenizer, documents, completions, generation, advance, heartbeat_timeout, reading),
        chat=spec.chat,
        special_tokens=spec.special_tokens,
    )
    activations = DecodedActivations(completions.folder, arrays, completions_module.PART, generation.max_new_tokens)
    conditions = request[CAPTURE][CONDITIONS] | {DECODING: True}
    return DecodedCompletions(completions.open(), activations, conditions, verdict)


def _prompt_batching(
    model: torch.nn.Module,
    tokenizer: Any,
    points: tuple[hooks.HookPoint, ...],
    arrays: dict[str, Any],
    verdict: Verdict,
) -> tuple[Batching, str]:
    """Return the prompts that may share a batch, and why not all may: a small prompt is run alone and with a longer."""
    if verdict.batching == "single":
        return "single", f"{verdict.because}: each prompt is completed alone"
    ids = example_inputs(model, shape=(2, LONG))["input_ids"].tolist()
    prompts = [ids[0][:SHORT], ids[1]]
    writer_options = Generation(max_new_tokens=1, batch=2)
    found: list[dict[ArrayKey, torch.Tensor]] = []
    with tempfile.TemporaryDirectory(prefix="flexcache-trial-") as folder:
        try:
            with ActivationReader(model, points, arrays) as reader:
                writer = CompletionWriter(model, tokenizer, writer_options, reader=reader)
                for count in (1, 2):
                    file = Path(folder) / str(count)
                    table = pa.table({"id": ["a", "b"][:count], "tokens": prompts[:count]})
                    writer.table(table, 0, file)
                    layout = ActivationLayout(arrays, [len(prompt) + 1 for prompt in prompts[:count]])
                    found.append(layout.read_document(file, 0, SHORT))
        except SiteError as error:
            raise ConfigError(
                "a site cannot be read while the model generates",
                where="generate.capture",
                found=str(error),
                remedy=RUN_AGAIN,
            ) from error
    alone, padded = found
    eps = unit_rounding(model)
    exact = eps <= FLOAT32_EPS
    bound = EXACT if exact else NEIGHBOURS * eps
    differences = {key: relative_differences(padded[key], alone[key], floor=SMALL).nan_to_num(0.0) for key in alone}
    worst = {key: float(values.max() if exact else values.median()) for key, values in differences.items()}
    key = max(worst, key=lambda key: worst[key])
    if worst[key] <= bound:
        return "padded", ""
    changes = f"{name_key(key)} changes by {worst[key]:.1e} of its norm with padding before a prompt"
    return "equal_lengths", f"{changes}: batches hold prompts of one length only"
