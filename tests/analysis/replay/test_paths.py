"""Patches of single heads, and of paths between two sites, against plain PyTorch hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from analysis import replay
from flexcache.errors import AnalysisError, FlexCacheError
from tests.corpora import token_documents
from tests.models import DEPTH, HIDDEN, VOCABULARY

DOCUMENTS = token_documents([6] * 4 + [4, 5], vocabulary=VOCABULARY)
IDS = [document["id"] for document in DOCUMENTS]
DONORS = dict(zip(IDS[:4], [*IDS[1:4], IDS[0]]))
SITES = ["resid_post", "z", "q", "k", "v", "attn_out", "mlp_out"]
ANSWERS = (5, 9)
SIZE = 16
"""Features of a head."""
FACTOR = 5000.0
"""Small random models hardly attend to anything: only a large change travels along a path."""
Captured = Callable[..., Any]
Hooks = list[tuple[Any, str, Callable[[torch.Tensor], torch.Tensor | None]]]


@contextmanager
def hooked(hooks: Hooks) -> Iterator[None]:
    """Replace inputs or outputs of modules by what the functions return, or only show them."""
    handles = []
    for module, side, function in hooks:
        if side == "input":

            def on_input(_: Any, args: Any, function: Any = function) -> Any:
                made = function(args[0])
                return None if made is None else (made, *args[1:])

            handles.append(module.register_forward_pre_hook(on_input))
        else:

            def on_output(_: Any, args: Any, output: Any, function: Any = function) -> Any:
                made = function(output[0] if isinstance(output, tuple) else output)
                return None if made is None else (made, *output[1:]) if isinstance(output, tuple) else made

            handles.append(module.register_forward_hook(on_output))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def parts(model: Any, family: str, layer: int) -> tuple[Any, Any, Any]:
    """Return the output projection of attention, the MLP term, and the module of queries, or of all three."""
    if family == "gpt2":
        block = model.transformer.h[layer]
        return block.attn.c_proj, block.mlp, block.attn.c_attn
    if family == "gpt_neox":
        block = model.gpt_neox.layers[layer]
        return block.attention.dense, block.mlp, block.attention.query_key_value
    block = model.model.layers[layer]
    mlp = block.post_feedforward_layernorm if family == "olmo2" else block.mlp
    return block.self_attn.o_proj, mlp, block.self_attn.q_proj


def attention_term(model: Any, family: str, layer: int) -> Any:
    return model.model.layers[layer].post_attention_layernorm if family == "olmo2" else parts(model, family, layer)[0]


def read_slice(family: str, head: int) -> slice:
    """Return the features of a head's queries in Llama's projection, of its values in a fused one."""
    start = {"gpt_neox": SIZE * (3 * head + 2), "gpt2": 2 * HIDDEN + SIZE * head}.get(family, SIZE * head)
    return slice(start, start + SIZE)


def run(model: Any, document: dict[str, Any], hooks: Hooks) -> torch.Tensor:
    with torch.no_grad(), hooked(hooks):
        logits: torch.Tensor = model(torch.tensor([document["tokens"]]), use_cache=False).logits[0, -1].double()
    return logits


def record(model: Any, document: dict[str, Any], places: dict[str, tuple[Any, str]]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[torch.Tensor], None]:
        return lambda value: found.update({name: value.clone()})

    run(model, document, [(module, side, keep(name)) for name, (module, side) in places.items()])
    return found


def with_slice(value: torch.Tensor, position: int, features: slice, new: torch.Tensor) -> torch.Tensor:
    changed = value.clone()
    changed[0, position, features] = new
    return changed


def difference(logits: torch.Tensor) -> float:
    return float(logits[ANSWERS[0]] - logits[ANSWERS[1]])


def values(found: replay.Sweep, **at: Any) -> dict[str, float]:
    one = found.results["value"].sel(arm="edit", metric="logit_diff", **at).squeeze()
    return dict(zip(map(str, one["document"].values), one.values.tolist()))


QUIET: dict[str, Any] = {"progress": False, "readout": "last", "answers": ANSWERS}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_map_by_head_patches_one_head_at_a_time(family: str, captured: Captured) -> None:
    store, model = captured(family, documents=DOCUMENTS, batch_tokens=24, sites=SITES)
    at = replay.grid("z", layers=[1, 3], positions=-2, heads="each")
    found = replay.sweep(store, model, at, replay.Patch(DONORS), ["logit_diff"], **QUIET)
    assert found.results["head"].values.tolist() == [0, 1, 2, 3]
    for layer in (1, 3):
        projection = parts(model, family, layer)[0]
        for name, donor in DONORS.items():
            z = record(model, DOCUMENTS[IDS.index(donor)], {"z": (projection, "input")})["z"][0, -2]
            for head in range(4):
                part = slice(SIZE * head, SIZE * head + SIZE)
                patch = lambda value, part=part, z=z: with_slice(value, -2, part, z[part])  # noqa: E731
                expected = difference(run(model, DOCUMENTS[IDS.index(name)], [(projection, "input", patch)]))
                got = values(found, layer=layer, edit=f"Patch head {head}")[name]
                assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("site", ["k", "v"])
def test_heads_of_keys_and_values_are_those_of_the_groups(site: str, captured: Captured) -> None:
    store, model = captured("llama", documents=DOCUMENTS, batch_tokens=24, sites=SITES)
    at = replay.grid(site, layers=2, positions=1, heads="each")
    found = replay.sweep(store, model, at, replay.Zero(), ["logit_diff"], **QUIET)
    assert found.results["head"].values.tolist() == [0, 1], "two groups"
    attention = model.model.layers[2].self_attn
    for head in range(2):
        part = slice(SIZE * head, SIZE * head + SIZE)
        zero = lambda value, part=part: with_slice(value, 1, part, torch.zeros(SIZE))  # noqa: E731
        for document in DOCUMENTS:
            expected = difference(run(model, document, [(getattr(attention, f"{site}_proj"), "output", zero)]))
            assert values(found, edit=f"Zero head {head}")[document["id"]] == pytest.approx(expected, abs=1e-5)


def test_several_heads_of_several_edits_keep_their_numbers_and_strengths(captured: Captured, tmp_path: Any) -> None:
    store, model = captured("llama", documents=DOCUMENTS, batch_tokens=24, sites=SITES)
    at = replay.grid("z", layers=[1, 2], heads=[3, 1])
    edits = replay.Scale([0.0, 2.0]) | replay.Zero()
    found = replay.sweep(store, model, at, edits, ["logit_diff", "kl_sum"], ["norm_matched"], **QUIET)
    assert found.results["edit"].values.tolist() == ["Scale head 3", "Scale head 1", "Zero head 3", "Zero head 1"]
    assert values(found, layer=1, edit="Scale head 1", alpha=0.0) == values(found, layer=1, edit="Zero head 1", alpha=1)
    found.save(tmp_path)
    assert replay.load(tmp_path).results["head"].values.tolist() == [3, 1, 3, 1]
    figure = found.plot(metric="kl_sum")
    panels = [axes for axes in figure.axes if axes.images]
    titles = ["Scale, strength 2", "norm matched for Scale, strength 2", "Zero", "norm matched for Zero"]
    assert [axes.get_title(loc="left") for axes in panels] == titles
    mean = found.effect()["mean"].sel(arm="edit", metric="kl_sum", edit=["Zero head 3", "Zero head 1"], alpha=1)
    shown: Any = panels[2].images[0].get_array()
    np.testing.assert_allclose(shown, mean.transpose("layer", "edit", "position").values[..., 0])
    assert "head 3" in str(found.table(4).columns[2]._cells)


def test_the_control_of_an_edit_of_a_head_moves_that_head_only() -> None:
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    context: Any = type("Context", (), {"unit_noise": lambda self, like, salt: torch.ones_like(like) / 8})()
    moved = replay.NormMatched(replay.OnHeads(replay.Zero(), 2, 4)).change(x, context) - x
    assert (moved[:, :32] == 0).all()
    assert (moved[:, 48:] == 0).all()
    torch.testing.assert_close(moved.norm(dim=-1), x[:, 32:48].norm(dim=-1))


def path_by_hand(model: Any, family: str, name: str, sender: tuple[int, int], receiver: tuple[int, int]) -> float:
    """Return the logit difference when a scaled head of the last token reaches one later head."""
    document = DOCUMENTS[IDS.index(name)]
    (layer, head), (later, reader) = sender, receiver
    part = slice(SIZE * head, SIZE * head + SIZE)
    places = {f"attn{n}": (attention_term(model, family, n), "output") for n in range(DEPTH)}
    places |= {f"mlp{n}": (parts(model, family, n)[1], "output") for n in range(DEPTH)}
    clean = record(model, document, places)
    projection, queries = parts(model, family, layer)[0], parts(model, family, later)[2]
    z = FACTOR * record(model, document, {"z": (projection, "input")})["z"][0, -1, part]
    freeze = lambda key: (*places[key], lambda _: clean[key])  # noqa: E731
    frozen = [freeze(f"attn{n}") for n in range(layer + 1, later)] + [freeze(f"mlp{n}") for n in range(layer, later)]
    moved: dict[str, torch.Tensor] = {}
    run(
        model,
        document,
        [
            (projection, "input", lambda value: with_slice(value, -1, part, z)),
            *frozen,
            (queries, "output", lambda value: moved.update(q=value.clone())),
        ],
    )
    read = read_slice(family, reader)
    receive = lambda value: with_slice(value, -1, read, moved["q"][0, -1, read])  # noqa: E731
    return difference(run(model, document, [(queries, "output", receive)]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "olmo2"])
def test_a_path_reaches_the_output_by_way_of_the_receiver_only(family: str, captured: Captured) -> None:
    store, model = captured(family, documents=DOCUMENTS, batch_tokens=24, sites=SITES)
    receiver = replay.Receiver("v" if family.startswith("gpt") else "q", layer=3, heads=2, positions="last")
    at = replay.grid("z", layers=[0, 1], positions="last", heads=[0, 3], receiver=receiver)
    found = replay.sweep(store, model, at, replay.Scale(FACTOR), ["logit_diff"], **QUIET)
    moved = 0.0
    for layer in (0, 1):
        for head in (0, 3):
            got = values(found, layer=layer, edit=f"Scale head {head}")
            for name in IDS:
                expected = path_by_hand(model, family, name, (layer, head), (3, 2))
                assert got[name] == pytest.approx(expected, abs=5e-6)
                unchanged = difference(run(model, DOCUMENTS[IDS.index(name)], []))
                moved = max(moved, abs(expected - unchanged))
    assert moved > 1e-4, "the path carries something"
    assert found.results.attrs["question"]["receiver"]["layer"] == 3


def test_a_path_to_the_last_residual_is_the_direct_effect(captured: Captured) -> None:
    store, model = captured("llama", documents=DOCUMENTS, batch_tokens=24, sites=SITES)
    receiver = replay.Receiver("resid_post", layer=-1)
    at = replay.grid("z", positions="last", heads="each", receiver=receiver)
    found = replay.sweep(store, model, at, replay.Patch(DONORS), ["logit_diff"], **QUIET)
    assert found.results["layer"].values.tolist() == [0, 1, 2, 3]
    assert {name for name, value in values(found, layer=0, edit="Patch head 0").items() if value == value} == {*DONORS}
    for name, donor in DONORS.items():
        last = torch.from_numpy(store.read("resid_post", 3, store.rows(name, -1)))
        for layer in range(DEPTH):
            own, theirs = (torch.from_numpy(store.read("z", layer, store.rows(one, -1))) for one in (name, donor))
            weight = model.model.layers[layer].self_attn.o_proj.weight
            for head in range(4):
                part = slice(SIZE * head, SIZE * head + SIZE)
                with torch.no_grad():
                    moved = last + (theirs - own)[:, part] @ weight[:, part].T
                    expected = difference(model.lm_head(model.model.norm(moved))[0].double())
                assert values(found, layer=layer, edit=f"Patch head {head}")[name] == pytest.approx(expected, abs=1e-5)


def test_a_path_without_a_change_changes_nothing(captured: Captured) -> None:
    store, model = captured("llama", documents=DOCUMENTS, batch_tokens=24, sites=SITES)
    for receiver in (replay.Receiver("mlp_out", 2), replay.Receiver("attn_out", 3), replay.Receiver("k", 2, [0])):
        at = replay.grid("attn_out", layers=1, positions="all", receiver=receiver)
        found = replay.sweep(store, model, at, replay.Scale([1.0, 3.0]), ["kl_sum"], progress=False)
        kl = found.results["value"].sel(arm="edit", metric="kl_sum").squeeze()
        assert (kl.sel(alpha=1) == 0).all()
        assert (kl.sel(alpha=3) > 0).all()


def test_a_receiver_at_positions_of_documents_leaves_out_the_others(captured: Captured) -> None:
    store, model = captured("llama", documents=DOCUMENTS, batch_tokens=24, sites=SITES)
    receiver = replay.Receiver("v", 3, positions={IDS[0]: [1, 2], IDS[4]: 0})
    at = replay.grid("mlp_out", layers=0, positions="all", receiver=receiver)
    found = replay.sweep(store, model, at, replay.Zero(), ["kl_sum"], progress=False)
    kl = found.results["value"].sel(arm="edit", metric="kl_sum").squeeze()
    assert {str(name) for name in kl["document"].values[np.isfinite(kl.values)]} == {IDS[0], IDS[4]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "resid_post", "heads": "each"}, "site resid_post has no heads"),
        ({"site": "z", "heads": [4]}, "z has no head 4"),
        ({"site": "k", "heads": [2]}, "k has no head 2"),
        ({"site": "z", "heads": "all"}, "heads cannot be read"),
        ({"site": "z", "heads": [1, 1]}, "heads cannot be read"),
        ({"site": "z", "receiver": "q"}, "a receiver cannot be read"),
        ({"site": "z", "layers": [1, 3], "receiver": ("q", 3)}, "no path leads from the edit to the receiver"),
        ({"site": "z", "receiver": ("q", 0)}, "no path leads from the edit to the receiver"),
        ({"site": "model.norm", "receiver": ("q", 3)}, "no path leads from the edit to the receiver"),
        ({"site": "z", "receiver": ("q", 3, [4])}, "q has no head 4"),
        ({"site": "z", "receiver": ("q", 7)}, "no layer 7"),
        ({"site": "z", "receiver": ("resid_mid", 3)}, "cannot receive a path"),
        ({"site": "z", "receiver": ("q", "3")}, "a receiver has one layer"),
        ({"site": "z", "receiver": ("q", 3, None, "each")}, "positions of a receiver cannot be read"),
        ({"site": "z", "receiver": ("q", 3, None, {"nobody": [1]})}, "no document 'nobody'"),
    ],
)
def test_heads_and_receivers_that_do_not_fit_raise_an_error(
    options: dict[str, Any], message: str, captured: Captured
) -> None:
    store, model = captured("llama", documents=DOCUMENTS, batch_tokens=24, sites=SITES)

    def ask() -> None:
        given = options | ({"receiver": replay.Receiver(*r)} if isinstance(r := options.get("receiver"), tuple) else {})
        replay.sweep(store, model, replay.grid(**given), replay.Zero(), progress=False)

    with pytest.raises(FlexCacheError, match=message):
        ask()


def test_a_path_with_copies_raises_an_error(captured: Captured) -> None:
    store, model = captured("llama", documents=DOCUMENTS, batch_tokens=24, sites=SITES)
    at = replay.grid("z", receiver=replay.Receiver("q", 3))
    with pytest.raises(AnalysisError, match="path patching runs one edit in a forward"):
        replay.sweep(store, model, at, replay.Zero(), copies=4, progress=False)
