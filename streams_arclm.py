"""How the columns of one forward pass are read: positions, blocks, and who may attend to whom."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .cache_arclm import ArcLMCache


class Streams(NamedTuple):
    """The columns of one forward pass: `num_noisy` noisy ones, then the clean ones.

    With both streams, T = 4 tokens and blocks of 2, this is who may attend to whom (rows query, columns key):

               x_t       x_0
            0 1 2 3 | 0 1 2 3
        x_t D D . . | . . . .     D block diagonal: a noisy block sees itself
            D D . . | . . . .
            . . D D | O O . .     O offset block causal: and the clean blocks before it
            . . D D | O O . .
        x_0 . . . . | C C . .     C block causal: a clean block sees itself and the clean blocks before it
            . . . . | C C . .       (with context_attention="causal": a clean token sees itself and those before it)
            . . . . | C C C C
            . . . . | C C C C

    Fields:
        num_noisy: 0 (clean only), all columns (a denoising step), or half of them (both streams, [x_t ; x_0]).
        block_size: tokens per block.
        cos, sin: [B or 1, columns, rotary_dim] rotary embedding.
        attention_mask: [B or 1, 1, columns, context + columns], True (0.0 for eager attention) where a query may
            attend to a key; `None` where every query may attend to every key.
        token_mask: [B, T] bool, True for tokens, False for padding, always on the right; `None` without padding.
    """

    num_noisy: int
    block_size: int
    cos: torch.Tensor
    sin: torch.Tensor
    attention_mask: torch.Tensor | None
    token_mask: torch.Tensor | None

    @classmethod
    def of(
        cls,
        config,
        hidden_states: torch.Tensor,
        num_noisy: int,
        block_size: int,
        token_mask: torch.Tensor | None,
        cache: ArcLMCache | None,
    ) -> "Streams":
        """Lay out hidden_states [B, columns, D] after the context in `cache`."""
        columns = hidden_states.shape[1]
        tokens = num_noisy or columns
        position_ids = torch.arange(tokens, device=hidden_states.device)[None]  # [B or 1, T]
        if cache is not None and cache.lengths is not None:
            position_ids = position_ids + cache.lengths[:, None]
        if columns > tokens:
            position_ids = torch.cat((position_ids, position_ids), 1)
        noisy = torch.arange(columns, device=hidden_states.device) < num_noisy
        mask = _attention_mask(position_ids, noisy, block_size, config.context_attention == "causal")
        if token_mask is not None:  # a padding query keeps itself, for a softmax over nothing is NaN
            keys = token_mask.repeat(1, columns // tokens)[:, None]
            mask = mask & keys | torch.eye(columns, dtype=torch.bool, device=mask.device)
        if cache is not None and cache.num_columns:
            context = mask.new_ones(1, 1, cache.num_columns) if cache.token_mask is None else cache.token_mask[:, None]
            rows = max(len(mask), len(context))
            mask = torch.cat((context.expand(rows, columns, -1), mask.expand(rows, -1, -1)), -1)
        mask = None if _all_visible(config, columns, num_noisy, block_size, token_mask, cache) else mask[:, None]
        if mask is not None and config._attn_implementation == "eager":  # eager attention adds its mask to the scores
            mask = torch.zeros_like(mask, dtype=hidden_states.dtype).masked_fill(
                ~mask, torch.finfo(hidden_states.dtype).min
            )
        return cls(num_noisy, block_size, *_rotary(config, position_ids, hidden_states.dtype), mask, token_mask)


def _attention_mask(position_ids: torch.Tensor, noisy: torch.Tensor, block_size: int, causal: bool) -> torch.Tensor:
    """[B or 1, columns, columns] bool, the drawing above, for positions [B or 1, columns] and `noisy` [columns]."""
    q, k = position_ids[..., :, None], position_ids[..., None, :]
    q_block, k_block = q // block_size, k // block_size
    block_diagonal = noisy[:, None] & noisy & (q_block == k_block)
    offset_block_causal = noisy[:, None] & ~noisy & (q_block > k_block)
    context = ~noisy[:, None] & ~noisy & (q >= k if causal else q_block >= k_block)
    return block_diagonal | offset_block_causal | context


def _all_visible(config, columns, num_noisy, block_size, token_mask, cache) -> bool:
    """Whether the mask would be True everywhere, known from shapes alone: one block, no padding."""
    if token_mask is not None or (cache is not None and cache.token_mask is not None) or columns > block_size:
        return False
    return num_noisy == columns or (num_noisy == 0 and config.context_attention == "block_causal")


def _rotary(config, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [B or 1, T, rotary_dim] of positions [B or 1, T].

    Qwen3.5's multimodal rotary embedding with equal time, height and width positions, which is what text has, is the
    plain partial one.
    """
    parameters = config.rope_parameters
    scaling = 1.0
    if parameters["rope_type"] == "default":
        dim = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        inv_freq = parameters["rope_theta"] ** (-torch.arange(0, dim, 2, device=position_ids.device).float() / dim)
    else:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, position_ids.device)
    angle = position_ids[..., None].float() * inv_freq
    angle = torch.cat((angle, angle), -1)
    return (angle.cos() * scaling).to(dtype), (angle.sin() * scaling).to(dtype)


def left_align(
    attention_mask: torch.Tensor | None, input_ids: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Move the padding of every row to its right end, so that column, position and block agree in all rows.

    Args:
        attention_mask: [B, T] or [B, context + T], 1 for tokens.
        input_ids: [B, T].

    Returns:
        order [B, T], the column that each aligned column comes from, and token_mask [B, T] bool of the aligned rows;
        both `None` without padding.
    """
    if attention_mask is None:
        return None, None
    batch, tokens = input_ids.shape
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask must be [{batch}, {tokens}], 1 for tokens and 0 for padding, got "
            f"{list(attention_mask.shape)}. Use the one the tokenizer returns."
        )
    token_mask = attention_mask[:, -tokens:].bool()
    if token_mask.all():
        return None, None
    order = token_mask.int().argsort(dim=1, descending=True, stable=True)
    return order, token_mask.gather(1, order)


def shift_right(noisy: torch.Tensor, clean: torch.Tensor, cache: ArcLMCache | None, block_size: int) -> torch.Tensor:
    """Hidden states [B, T, D] one position earlier; before a block's first token comes the last clean one.

    The first token of a row has nothing before it and keeps its own.
    """
    previous = torch.cat((noisy[:, :1], noisy[:, :-1]), 1)
    if clean.shape[1]:
        position = torch.arange(noisy.shape[1], device=noisy.device)
        starts = (position % block_size == 0) & (position > 0)
        return torch.where(starts[:, None], F.pad(clean[:, :-1], (0, 0, 1, 0)), previous)
    if cache is not None and cache.lengths is not None:
        first = torch.where((cache.lengths > 0)[:, None, None], cache.last_hidden_state, noisy[:, :1])
        return torch.cat((first, previous[:, 1:]), 1)
    return previous
