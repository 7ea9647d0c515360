"""Weighted cross-entropy of a language-model head without its logits in memory."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .layers_arclm import product_dtype
from .loss_kernels_arclm import add_logits, to_gradient, use_loss_kernels


# 2**24 float32 logits are 64 MB: that many at a time, whatever the number of targets.
CHUNK_LOGITS = 2**24
KERNEL_LOGITS = 2**26  # of 16 bits, changed in place: 134 MB


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
        loss_weights: [B, T], 1 if `None`. The gradient that flows to it is each position's cross-entropy.
        num_items_in_batch: the divisor, the number of targets if `None`.

    Returns:
        [] float32 (float64 for float64), 0 where there is no target.
    """
    if loss_weights is not None and loss_weights.shape != labels.shape:
        raise ValueError(f"loss_weights must be {list(labels.shape)} like labels, got {list(loss_weights.shape)}.")
    is_target = labels != -100
    factor = torch.ones_like(labels) if loss_weights is None else loss_weights
    # the head may be on another device than what goes into it
    hidden_states, labels, factor = (x[is_target].to(weight.device) for x in (hidden_states, labels, factor))
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or high >= len(weight):
        raise ValueError(
            f"labels has ids from {low} to {high}, outside the vocabulary [0, {len(weight)}). Use -100 for no target."
        )
    hidden_states = hidden_states.to(product_dtype(hidden_states))  # autocast does not look into an autograd function
    total = _LinearCrossEntropy.apply(hidden_states, weight, labels, factor)
    return total / (max(len(labels), 1) if num_items_in_batch is None else num_items_in_batch)


def weight_of(head: torch.nn.Module) -> torch.Tensor:
    """The weight [V, D] that the loss reads in place of calling the head; a ValueError for one with an adapter."""
    if hasattr(head, "base_layer"):  # of peft, whose own weights would get no gradient
        raise ValueError(
            "The loss reads the weight of lm_head and would not train an adapter on it. Leave lm_head out of "
            "target_modules, or name it in modules_to_save."
        )
    return head.weight


class _LinearCrossEntropy(torch.autograd.Function):
    """sum(factor * CE) over N targets, chunk by chunk of the vocabulary.

    The backward pass computes the logits again: with the log-sum-exp of each row known, the gradient of a chunk of the
    vocabulary needs nothing of the others. So each row of the weight gradient is written once; chunks of targets would
    read and write all V of them for each chunk.
    """

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        normalizer, target = (hidden.new_full((len(hidden),), x, dtype=dtype) for x in (-torch.inf, 0.0))
        add = add_logits if use_loss_kernels(hidden) else _add_logits
        for _, logits, places in _chunks(hidden, weight, labels):
            add(logits, places, normalizer, target)
        losses = normalizer - target
        ctx.save_for_backward(hidden, weight, labels, factor, normalizer, losses)
        return (losses * factor).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple:
        hidden, weight, labels, factor, normalizer, losses = ctx.saved_tensors
        grad_factor = losses * grad if ctx.needs_input_grad[3] else None
        factor = factor.to(normalizer.dtype) * grad
        grad_hidden = torch.zeros_like(hidden, dtype=normalizer.dtype)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        to = to_gradient if use_loss_kernels(hidden) else _to_gradient
        for part, logits, places in _chunks(hidden, weight, labels):
            to(logits, places, normalizer, factor)
            grad_logits = logits.to(hidden.dtype)
            grad_hidden += grad_logits @ weight[part].to(hidden.dtype)
            if grad_weight is not None:
                grad_weight[part] = grad_logits.mT @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None, grad_factor


def _chunks(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple]:
    """Yield a slice of the vocabulary, its logits [N, size], and the columns of the labels in it [N]."""
    by_kernel = use_loss_kernels(hidden)
    size = (KERNEL_LOGITS if by_kernel else CHUNK_LOGITS) // max(1, len(hidden))
    # products of 16 bits whose rows do not begin at multiples of 16 bytes take five times as long on a GPU
    size = max(1, size // 64 * 64 or size)
    for start in range(0, len(weight), size):
        part = slice(start, min(start + size, len(weight)))
        logits = F.linear(hidden, weight[part].to(hidden.dtype))
        yield (
            part,
            logits if by_kernel else logits.to(torch.promote_types(hidden.dtype, torch.float32)),
            labels - start,
        )


def _add_logits(logits: torch.Tensor, places: torch.Tensor, normalizer: torch.Tensor, target: torch.Tensor) -> None:
    """`add_logits` of `loss_kernels_arclm.py`."""
    torch.logaddexp(normalizer, logits.logsumexp(-1), out=normalizer)
    index, inside = _inside(places, logits)
    target.copy_(torch.where(inside, logits.gather(1, index).squeeze(1), target))


def _to_gradient(logits: torch.Tensor, places: torch.Tensor, normalizer: torch.Tensor, factor: torch.Tensor) -> None:
    """`to_gradient` of `loss_kernels_arclm.py`."""
    index, inside = _inside(places, logits)
    logits.sub_(normalizer[:, None]).exp_().scatter_add_(1, index, -inside.to(logits.dtype)[:, None])
    logits.mul_(factor[:, None])


def _inside(places: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A column [N, 1] for each row, and whether it is the one meant [N]."""
    size = logits.shape[1]
    return places.clamp(0, size - 1)[:, None], (places >= 0) & (places < size)
