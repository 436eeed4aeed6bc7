"""Functions for `flexcache.Transform` that reduce an attention pattern to the attention paid to one token.

They expect documents that repeat themselves, [A B C … A B C …], and find the halves from the length of a document.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from flexcache.provenance import recorded_as
from flexcache.recording.forward.objective import NextTokenLoss

if TYPE_CHECKING:
    from torch import Tensor

    from flexcache.recording.forward.batch import Batch


@recorded_as("analysis.induction.transforms.induction", "eb012240c94eabf973e2b1099b291055")
def induction(pattern: Tensor, batch: Batch) -> Tensor:
    """Return the attention of each token to the token after its earlier occurrence; 0 in the first half.

    With halves of T tokens, that is the attention of position i to position i − T + 1.

    Parameters
    ----------
    pattern : Tensor, shape (sequences, heads, queries, keys)

    Returns
    -------
    Tensor, shape (sequences, queries, heads)
    """
    period = torch.tensor([len(tokens) // 2 for tokens in batch.tokens], device=pattern.device)[:, None]
    query = torch.arange(pattern.shape[2], device=pattern.device)
    after = (query - period + 1).clamp(0, pattern.shape[3] - 1)  # (sequences, queries)
    index = after[:, None, :, None].expand(*pattern.shape[:3], 1)
    paid = pattern.gather(3, index).squeeze(3).transpose(1, 2)
    return paid * (query >= period)[..., None]


@recorded_as("analysis.induction.transforms.previous_token", "cfad7242af799ab96d400b34358e72f9")
def previous_token(pattern: Tensor) -> Tensor:
    """Return the attention of each token to the token before it; 0 at the first token.

    Parameters
    ----------
    pattern : Tensor, shape (sequences, heads, queries, keys)

    Returns
    -------
    Tensor, shape (sequences, queries, heads)
    """
    return pad(pattern.diagonal(-1, 2, 3), (1, 0)).transpose(1, 2)


@recorded_as("analysis.induction.transforms.next_token_loss", "96fb0288c6248bc31e57996982767d38")
def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the loss of the prediction of the next token at each token, in nats; 0 at the end of a sequence.

    Parameters
    ----------
    logits : Tensor, shape (sequences, longest, vocabulary)

    Returns
    -------
    Tensor, shape (sequences, longest)
    """
    return NextTokenLoss()(SimpleNamespace(logits=logits), batch)
