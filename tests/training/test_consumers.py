"""Trainers of other packages, fed by the stream, if they are installed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import flexcache
from flexcache.training import stream
from tests.corpora import build_store, lengths, token_documents

FEATURES = 24
FOREIGN = pytest.mark.filterwarnings("ignore")  # of theirs


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    return build_store(tmp_path_factory.mktemp("consumed") / "run.zarr", token_documents(lengths(300)))


def forever(store: flexcache.Store) -> Iterator[torch.Tensor]:
    """Yield batches of one epoch after another, each in another order."""
    batches = stream(store, "resid_post", 3, batch_size=256, normalize="standard", drop_last=True)
    return itertools.chain.from_iterable(itertools.repeat(batches))


@FOREIGN
def test_saelens_trains_on_the_stream(store: flexcache.Store) -> None:
    pytest.importorskip("sae_lens", exc_type=ImportError)
    from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=FEATURES, d_sae=96, k=8, dtype="float32", device="cpu"))
    settings = SAETrainerConfig(
        total_training_samples=256 * 60, train_batch_size_samples=256, device="cpu", autocast=False, lr=3e-3,
        lr_end=3e-4, lr_scheduler_name="constant", lr_warm_up_steps=0, lr_decay_steps=0, adam_beta1=0.9,
        adam_beta2=0.999, n_restart_cycles=1, dead_feature_window=1000, feature_sampling_window=2000, n_checkpoints=0,
        checkpoint_path=None, save_final_checkpoint=False, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    batch = next(forever(store))
    before = (sae(batch) - batch).pow(2).mean()
    trained = SAETrainer(settings, sae, forever(store)).fit()
    assert (trained(batch) - batch).pow(2).mean() < 0.7 * before


@FOREIGN
def test_dictionary_learning_trains_on_the_stream(store: flexcache.Store, tmp_path: Path) -> None:
    pytest.importorskip("dictionary_learning.training", exc_type=ImportError)
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE

    settings = {
        "trainer": TopKTrainer, "dict_class": AutoEncoderTopK, "activation_dim": FEATURES, "dict_size": 96, "k": 8,
        "lr": 3e-3, "steps": 120, "warmup_steps": 1, "layer": 3, "lm_name": "arithmetic", "device": "cpu",
    }  # fmt: skip
    trainSAE(
        forever(store), [settings], steps=120, save_dir=str(tmp_path), normalize_activations=False, device="cpu",
        autocast_dtype=torch.float32,
    )  # fmt: skip
    sae = AutoEncoderTopK.from_pretrained(str(tmp_path / "trainer_0" / "ae.pt"), k=8, device="cpu")
    batch = next(forever(store))
    assert (sae(batch) - batch).pow(2).mean() < 0.6 * batch.pow(2).mean()


@FOREIGN
def test_sparsify_trains_on_the_stream(store: flexcache.Store) -> None:
    pytest.importorskip("sparsify", exc_type=ImportError)
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(FEATURES, SparseCoderConfig(num_latents=96, k=8), device="cpu", dtype=torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    losses = []
    for batch in itertools.islice(forever(store), 120):
        loss = sae(batch).fvu
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
