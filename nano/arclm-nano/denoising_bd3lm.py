"""A denoising step after the model's layers: propose a token for each masked position, accept some, settle them.

The functions change a `Block` in place and never ask the host, so that `graphs_arclm.py` can capture them.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from .kernels_arclm import sample_rows


class Block(NamedTuple):
    """The block that is being denoised, in each row of the batch.

    Fields:
        ids: [B, L], mask tokens where nothing is settled.
        is_masked: [B, L] bool, positions to fill.
        is_left: [] bool, whether there is one.
        can_end: [B, L] bool, positions of the answer: an end token in the prompt ends nothing.
        places: [B, L] int64, the number of the position in the batch, from 1: random numbers go with it.
        priority: [B, L] float32, the order of `sequential` or `random`, the smallest first.
        share_of: [B] over how many tokens the static strategies spread the steps, at least those masked at first.
        step: [1] int64, steps taken.
        seed: [1] int64, of what `sample_rows` draws in this block.
        is_finite: [B, L] bool, whether the position has had probabilities at all steps.
        row_steps: [B] int64, steps with a masked position, those of earlier blocks too.
        end_tokens: [V] bool.
        is_suppressed: [V] bool, for `sample_rows`; `None` where it is not used.
    """

    ids: torch.Tensor
    is_masked: torch.Tensor
    is_left: torch.Tensor
    can_end: torch.Tensor
    places: torch.Tensor
    priority: torch.Tensor
    share_of: torch.Tensor
    step: torch.Tensor
    seed: torch.Tensor
    is_finite: torch.Tensor
    row_steps: torch.Tensor
    end_tokens: torch.Tensor
    is_suppressed: torch.Tensor | None

    @classmethod
    def of(cls, ids: torch.Tensor, is_masked: torch.Tensor, knobs: dict[str, Any], **others) -> "Block":
        """A block before its first step, with its random numbers."""
        places = torch.arange(1, ids.numel() + 1, device=ids.device).view_as(ids)
        is_random = knobs["remasking_strategy"] == "random"
        is_drawn = others["is_suppressed"] is not None and knobs["temperature"] is not None
        step = torch.zeros(1, dtype=torch.long, device=ids.device)
        return cls(
            ids,
            is_masked,
            is_left=is_masked.any(),
            places=places,
            priority=torch.rand(ids.shape, dtype=torch.float32, device=ids.device) if is_random else places.float(),
            step=step,
            seed=torch.randint(2**62, (1,), device=ids.device) if is_drawn else step,
            is_finite=torch.ones_like(is_masked),
            **others,
        )

    def ends(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, L] bool, where one of these ids [B, L] ends its row."""
        return self.end_tokens[ids] & self.can_end


class Proposal(NamedTuple):
    """A token for every masked position of a block.

    Fields:
        tokens: [B, L], the mask token where not masked.
        confidence: [B, L] float32, the model's probability of each, -1 where not masked.
        entropy: [B, L] float32, of the distributions in nats, infinite where not masked or not asked for. This and the
            confidence are taken before the processors: how sure the model is does not depend on how the caller
            samples.
        is_finite: [B, L] bool, False where there are no probabilities.
    """

    tokens: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor
    is_finite: torch.Tensor

    @classmethod
    def of_masked(cls, block: Block, masked: tuple, results: tuple, mask_token_id: int) -> "Proposal":
        """From results [M] of the masked positions, given by row [M] and offset in the block [M]."""
        empty = mask_token_id, -1, torch.inf, True
        return cls(
            *(
                torch.full_like(block.ids, value, dtype=result.dtype).index_put(masked, result)
                for value, result in zip(empty, results, strict=True)
            )
        )


def choose(head: nn.Module, hidden_states: torch.Tensor, block: Block, knobs: dict[str, Any]) -> None:
    """Take a denoising step from the hidden states [B, L, D] of all positions, so that all shapes are fixed.

    knobs: those of `take_step`, and `mask_token_id` and `temperature` as `sample_rows` takes them.
    """
    logits = head(hidden_states).flatten(0, 1)
    places = (block.places * block.is_masked).flatten()
    results = sample_block(logits, block, places, knobs)
    take_step(block, Proposal(*(x.view_as(block.ids) for x in results)), knobs)


def sample_block(logits: torch.Tensor, block: Block, places: torch.Tensor, knobs: dict[str, Any]) -> tuple:
    """`sample_rows` at places [R] of the block, with logits [R, V] and random numbers of this step."""
    temperature = knobs["temperature"]
    seed = None if temperature is None else block.seed + block.step
    sampling = {"temperature": temperature, "seed": seed, "places": places}
    return sample_rows(logits, block.is_suppressed, knobs["mask_token_id"], **sampling)


def take_step(block: Block, proposal: Proposal, knobs: dict[str, Any]) -> None:
    """Put the tokens that are accepted into the block; what follows a settled end token becomes end tokens.

    For the knobs see `accept_tokens`.
    """
    block.is_finite.logical_and_(proposal.is_finite)
    block.row_steps.add_(block.is_masked.any(1))
    accepted = accept_tokens(block, proposal, knobs)
    block.is_masked.logical_xor_(accepted)
    ids = torch.where(accepted, proposal.tokens, block.ids)
    last_end = torch.where(block.ends(ids), ids, -1).cummax(1).values
    # as in training, where the last block is filled with the end token
    after_end = block.is_masked & (last_end >= 0)
    torch.where(after_end, last_end, ids, out=block.ids)
    block.is_masked.logical_xor_(after_end)
    torch.any(block.is_masked, out=block.is_left)
    # what captures this runs it more often than there are steps
    block.step.add_(1).clamp_(max=knobs["max_denoising_steps"] - 1)


def accept_tokens(block: Block, proposal: Proposal, knobs: dict[str, Any]) -> torch.Tensor:
    """Choose which masked positions of a block to fill at this denoising step.

    An end token behind another proposed end token counts as unsure, 0 and 1e4 nats: it comes for nothing once the
    first one is accepted.

    Args:
        block: before the step.
        proposal: of this step.
        knobs: `max_denoising_steps` S, `remasking_strategy`, `confidence_threshold`, `entropy_bound`.

    Returns:
        [B, L] bool, a subset of `is_masked`, with a position of every row that has one left. After S steps every
        position of the block has been accepted.
    """
    strategy, steps, is_masked = knobs["remasking_strategy"], knobs["max_denoising_steps"], block.is_masked
    if strategy in ("sequential", "random"):
        order = torch.where(is_masked, block.priority, torch.inf)  # the smallest is accepted first
    else:
        is_end = block.ends(proposal.tokens)
        again = is_end & (is_end.cumsum(1) > 1)
        is_bound = strategy == "entropy_bound"
        order = proposal.entropy.masked_fill(again, 1e4) if is_bound else -proposal.confidence.masked_fill(again, 0.0)
    # [B, L, L], whether the second position is accepted before the first; of equal ones the left one. Two sorts would
    # be more kernels
    own, other = order[:, :, None], order[:, None]
    is_before = torch.where(_is_left_of(order.shape[1], order.device), other <= own, other < own)
    rank = is_before.sum(2)
    if strategy not in ("low_confidence_dynamic", "entropy_bound"):
        count = static_schedules(order.shape[1], steps, order.device)[block.share_of, block.step]
        return (rank < count[:, None]) & is_masked
    # the steps that are left must suffice for the positions that are left
    count = -(-is_masked.sum(1, keepdim=True) // (steps - block.step))
    if strategy == "low_confidence_dynamic":
        chosen = order < -knobs["confidence_threshold"]
    else:
        # EB-sampler (arXiv:2505.24857): what tokens accepted together may know of each other is at most the sum of
        # their entropies but for the largest
        chosen = torch.where(is_before, other, 0.0).sum(2) <= knobs["entropy_bound"]
    return (chosen | (rank < count)) & is_masked


def static_schedule(tokens: int, steps: int) -> list[int]:
    """How many of so many tokens the static strategies accept at each step: those left over the steps left, rounded.

    dLLM's linear schedule, without the steps whose share rounds to 0.
    """
    t = torch.tensor([step / steps for step in range(steps + 1)])
    t = 1 - (1 - t)  # as dLLM computes it: the rounding of float32 decides the ties
    counts = []
    for ratio in (t[:-1] / t[1:]).flip(0).tolist():
        counts.append(round((tokens - sum(counts)) * (1 - ratio)))
    return [count for count in counts if count]


# Asked at every denoising step. What they return is kept for good: captured steps go on reading it.
@cache
def static_schedules(block_size: int, steps: int, device: torch.device) -> torch.Tensor:
    """[block_size + 1, steps] the static schedule of each number of tokens, 0 after its end."""
    schedules = [static_schedule(tokens, steps) for tokens in range(block_size + 1)]
    return torch.tensor([counts + [0] * (steps - len(counts)) for counts in schedules], device=device)


@cache
def _is_left_of(block_size: int, device: torch.device) -> torch.Tensor:
    """[L, L] bool, whether the second position is left of the first."""
    return torch.ones(block_size, block_size, dtype=torch.bool, device=device).tril(-1)
