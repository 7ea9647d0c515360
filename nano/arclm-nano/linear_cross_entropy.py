"""Weighted cross-entropy of a language-model head without its logits in memory."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


# 2**24 float32 logits are 64 MB: that many at a time, whatever the vocabulary.
CHUNK_LOGITS = 2**24


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_weights: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Compute sum(loss_weights * CE(weight @ hidden_states, labels)) / num_items_in_batch over the labelled positions.

    Args:
        hidden_states: [B, T, D].
        weight: [V, D] of the head.
        labels: [B, T] target ids in [0, V), -100 for no target. Unshifted: position i against label i.
        loss_weights: [B, T], 1 if `None`.
        num_items_in_batch: the divisor, the number of targets if `None`.

    Returns:
        [] float32, 0 where there is no target.
    """
    if loss_weights is not None and loss_weights.shape != labels.shape:
        raise ValueError(f"loss_weights must be {list(labels.shape)} like labels, got {list(loss_weights.shape)}.")
    is_target = labels != -100
    hidden_states, labels = hidden_states[is_target], labels[is_target]
    loss_weights = torch.ones_like(labels) if loss_weights is None else loss_weights[is_target]

    rows = max(1, CHUNK_LOGITS // weight.shape[0])
    total = hidden_states.new_zeros((), dtype=torch.float32)
    for hidden, label, factor in zip(
        hidden_states.split(rows), labels.split(rows), loss_weights.split(rows), strict=True
    ):
        # the backward pass computes the logits of the chunk again instead of keeping them
        total = total + checkpoint(_chunk_loss, hidden, weight, label, factor, use_reentrant=False)
    return total / (max(len(labels), 1) if num_items_in_batch is None else num_items_in_batch)


def _chunk_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    return (F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none") * factor).sum()
