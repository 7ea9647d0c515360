"""Triton kernels of the cross-entropy of `linear_cross_entropy.py`, over one piece of the vocabulary at a time."""

import torch

from .kernels_arclm import CHECKS, normal_numbers, relative_error, tl, triton, usable


TILE = 4096


if triton is not None:

    @triton.jit  # specialised: rows that begin at multiples of 16 bytes are read 16 bytes at a time
    def _add_logits_kernel(logits, places, normalizer, target, size, TILE: tl.constexpr):
        """One row; see `add_logits`."""
        row = tl.program_id(0).to(tl.int64)
        x = logits + row * size
        highest, total = float("-inf"), 0.0
        for start in range(0, size, TILE):
            column = start + tl.arange(0, TILE)
            y = tl.load(x + column, mask=column < size, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, tl.max(y, 0))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(y - higher), 0)
            highest = higher
        before = tl.load(normalizer + row)
        higher = tl.maximum(highest, before)
        total = total * tl.exp(highest - higher) + tl.exp(before - higher)
        tl.store(normalizer + row, higher + tl.log(total))
        place = tl.load(places + row)
        if (place >= 0) & (place < size):
            tl.store(target + row, tl.load(x + place).to(tl.float32))

    @triton.jit
    def _to_gradient_kernel(logits, places, normalizer, factor, size, TILE: tl.constexpr):
        """TILE logits of one row; see `to_gradient`."""
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
        at, inside = logits + row * size + column, column < size
        y = tl.exp(tl.load(at, mask=inside, other=0.0).to(tl.float32) - tl.load(normalizer + row))
        y = tl.load(factor + row) * tl.where(column == tl.load(places + row), y - 1.0, y)
        tl.store(at, y.to(logits.dtype.element_ty), mask=inside)


def add_logits(logits: torch.Tensor, places: torch.Tensor, normalizer: torch.Tensor, target: torch.Tensor) -> None:
    """Add a piece of the vocabulary to the log-sum-exp of each row, and note the logit of its label.

    Args:
        logits: [N, size] contiguous.
        places: [N] int64, the column of the label, outside [0, size) if another piece has it.
        normalizer: [N] float32, changed in place; -inf before the first piece.
        target: [N] float32, changed in place where the label is in this piece.
    """
    with torch.cuda.device_of(logits):
        _add_logits_kernel[(len(logits),)](logits, places, normalizer, target, logits.shape[1], TILE=TILE, num_warps=8)


def to_gradient(logits: torch.Tensor, places: torch.Tensor, normalizer: torch.Tensor, factor: torch.Tensor) -> None:
    """Make factor (softmax - one-hot) of logits [N, size], in their place; factor [N] float32, the others as above."""
    rows, size = logits.shape
    with torch.cuda.device_of(logits):
        _to_gradient_kernel[(rows, triton.cdiv(size, TILE))](
            logits, places, normalizer, factor, size, TILE=TILE, num_warps=8
        )


def use_loss_kernels(hidden: torch.Tensor) -> bool:
    """Whether the two above take logits of that type there."""
    return hidden.dtype in (torch.bfloat16, torch.float16) and usable("cross_entropy", hidden.device, hidden.dtype)


def _check_cross_entropy(device: torch.device, dtype: torch.dtype) -> float:
    """A vocabulary in pieces, against float64."""
    logits, size = (normal_numbers(device)(5, 2 * TILE + 300) * 4).to(dtype), TILE + 100
    labels = torch.tensor([0, 7, size - 1, size, logits.shape[1] - 1], device=device)
    factor = torch.arange(1.0, 6.0, device=device)
    normalizer, target = torch.full((5,), -torch.inf, device=device), torch.zeros(5, device=device)
    starts = range(0, logits.shape[1], size)
    pieces = [piece.contiguous() for piece in logits.split(size, 1)]
    for start, piece in zip(starts, pieces, strict=True):
        add_logits(piece, labels - start, normalizer, target)
    for start, piece in zip(starts, pieces, strict=True):
        to_gradient(piece, labels - start, normalizer, factor)
    expected = logits.double()
    one_hot = torch.nn.functional.one_hot(labels, logits.shape[1])
    exact = expected.logsumexp(1), expected.gather(1, labels[:, None])[:, 0]
    gradient = factor[:, None] * (expected.softmax(1) - one_hot)
    return max(
        relative_error((normalizer, target), exact),
        # the gradient is as exact as its dtype
        relative_error((torch.cat(pieces, 1),), (gradient,)) * 1e-5 / torch.finfo(dtype).eps,
    )


CHECKS["cross_entropy"] = (_check_cross_entropy, 1e-5)
