"""How the columns of one forward pass are read: positions, blocks, and who may attend to whom."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from .attention_arclm import AttentionPart
from .cache_arclm import ArcLMCache, check_context


logger = logging.get_logger(__name__)

# Queries that attend at once, in longer passes: more of them look at keys in vain, fewer take more calls.
PART_SIZE = 256
# The backward pass keeps the keys of every part: with a bounded number of parts they grow no faster than the row.
MAX_PARTS = 8


class _Keys(NamedTuple):
    """The keys of an attention layer.

    Fields:
        columns: [S] where in the pass they come from, -1 for the context.
        position_ids: [B or 1, S], -1 for the context, which every query may see.
        is_token: [B or 1, S] bool; `None` where all are tokens.
    """

    columns: torch.Tensor
    position_ids: torch.Tensor
    is_token: torch.Tensor | None


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

    With both streams and a cache the noisy stream is one block, the one after the clean tokens.

    Fields:
        num_noisy: columns of the noisy stream: 0 (clean only), all (a denoising step), or with both streams those of
            the noisy blocks that are read, without a cache always whole blocks.
        block_size: tokens per block.
        noisy_blocks: [B or 1, M] with both streams and no cache, the index of each noisy block, ascending.
        position_ids: [B or 1, columns].
        order: [B, T], the caller's column that each aligned column comes from; `None` without padding.
        token_mask: [B, T] bool of the aligned rows, True for tokens, False for padding, which is on the right; `None`
            without padding.
        cos, sin: [B or 1, columns, rotary_dim] rotary embedding.
        attention: which keys the columns attend to, part by part.
    """

    num_noisy: int
    block_size: int
    noisy_blocks: torch.Tensor | None
    position_ids: torch.Tensor
    order: torch.Tensor | None
    token_mask: torch.Tensor | None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    attention: tuple[AttentionPart, ...] = ()

    @classmethod
    def of(
        cls,
        input_ids: torch.Tensor | None,
        noisy_input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        *,
        block_size: int,
        cache: ArcLMCache | None = None,
        needed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, "Streams"]:
        """Lay out one or both streams after the context in `cache`; returns ids [B, columns] and the layout.

        `needed` [B, T] bool limits the noisy stream to the blocks that hold a True.
        """
        ids = noisy_input_ids if input_ids is None else input_ids
        tokens = ids.shape[1]
        order, token_mask = left_align(attention_mask, ids)
        columns = _align(ids, order)
        position_ids = torch.arange(tokens, device=ids.device)[None]
        if cache is not None and cache.lengths is not None:
            position_ids = position_ids + cache.lengths[:, None]
        if input_ids is None or noisy_input_ids is None:
            return columns, cls(tokens if input_ids is None else 0, block_size, None, position_ids, order, token_mask)
        if cache is not None:
            starts = position_ids[:, :1] + (tokens if token_mask is None else token_mask.sum(1, keepdim=True))
            if (starts % block_size).any():
                raise ValueError(
                    f"With input_ids the cache would hold {starts.flatten().tolist()} tokens per row, not multiples "
                    f"of block_size={block_size}. A block that is denoised begins where whole blocks end."
                )
            noisy = starts + torch.arange(noisy_input_ids.shape[1], device=ids.device)
            position_ids = torch.cat((noisy, position_ids.expand(len(noisy), -1)), 1)
            columns = torch.cat((noisy_input_ids, columns), 1)
            return columns, cls(noisy.shape[1], block_size, None, position_ids, order, token_mask)

        blocks = needed_blocks(_align(needed, order), tokens, block_size, ids.device)
        noisy = (blocks[..., None] * block_size + torch.arange(block_size, device=ids.device)).flatten(1)
        x_t = F.pad(_align(noisy_input_ids, order), (0, -tokens % block_size)).gather(1, noisy.expand(len(ids), -1))
        columns = torch.cat((x_t, columns), 1)  # [x_t ; x_0]
        position_ids = torch.cat((noisy, position_ids.expand(len(noisy), -1)), 1)
        return columns, cls(noisy.shape[1], block_size, blocks, position_ids, order, token_mask)

    def for_layers(self, config, cache: ArcLMCache | None, dtype: torch.dtype) -> "Streams":
        """Add what the attention layers need: rotary embedding and mask, in the dtype of the hidden states."""
        cos, sin = _rotary(config, self.position_ids, dtype)
        columns, context = self.position_ids.shape[1], 0 if cache is None else cache.num_columns
        one_stream = self.num_noisy == columns or (self.num_noisy == 0 and config.context_attention == "block_causal")
        padding = self.token_mask is not None or (cache is not None and cache.token_mask is not None)
        if one_stream and columns <= self.block_size and not padding:  # a block sees all of itself and of its context
            attention = tuple(AttentionPart(*part, None) for part in self._parts(context))
            return self._replace(cos=cos, sin=sin, attention=attention)

        keys, attention = self._keys(cache), []
        for queries, slices in self._parts(context):
            seen = _Keys(*(x if x is None else torch.cat([x[..., part] for part in slices], -1) for x in keys))
            mask = self._may_attend(queries, seen, config.context_attention == "causal")[:, None]
            if config._attn_implementation == "eager":  # eager attention adds its mask to the scores
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            attention.append(AttentionPart(queries, slices, mask))
        return self._replace(cos=cos, sin=sin, attention=tuple(attention))

    def _parts(self, context: int) -> list[tuple[slice, tuple[slice, ...]]]:
        """Cut the queries into parts of whole blocks, and say which of the keys each needs."""
        columns = self.position_ids.shape[1]
        if columns <= max(PART_SIZE, 2 * self.block_size):
            return [(slice(columns), (slice(context + columns),))]
        size, parts = max(1, max(PART_SIZE, columns // MAX_PARTS) // self.block_size) * self.block_size, []
        if self.noisy_blocks is not None:  # keys [noisy ; clean]
            first = clean = self.num_noisy
            blocks_before = self.noisy_blocks.amax(0).tolist()
            for start in range(0, self.num_noisy, size):
                own = slice(start, min(start + size, self.num_noisy))
                before = blocks_before[own.stop // self.block_size - 1] * self.block_size
                parts.append((own, (own, slice(clean, clean + before))))
        else:  # keys [context ; clean ; noisy]
            first, clean = 0, context
            if self.num_noisy:
                parts.append((slice(self.num_noisy), (slice(context + columns),)))
        for start in range(0, columns - self.num_noisy, size):
            stop = min(start + size, columns - self.num_noisy)
            parts.append((slice(self.num_noisy + start, self.num_noisy + stop), (slice(first, clean + stop),)))
        return parts

    def _keys(self, cache: ArcLMCache | None) -> _Keys:
        """The keys of the pass: [noisy ; clean], with a cache [context ; clean ; noisy]."""
        columns, is_token = torch.arange(self.position_ids.shape[1], device=self.position_ids.device), self.token_mask
        tokens = len(columns) - self.num_noisy
        if self.noisy_blocks is None:
            if is_token is not None and is_token.shape[1] < len(columns):  # the padding is in the clean stream
                is_token = F.pad(is_token, (self.num_noisy, 0), value=True)
        elif is_token is not None or tokens % self.block_size:
            # the noisy stream has whole blocks, the last of which may go beyond the row
            is_token = columns.new_ones(1, tokens, dtype=torch.bool) if is_token is None else is_token
            noisy = self.position_ids[:, : self.num_noisy] < is_token.sum(1, keepdim=True)
            is_token = _side_by_side(noisy, is_token)
        keys = _Keys(columns, self.position_ids, is_token)
        if cache is None:
            return keys
        columns, position_ids, is_token = (x if x is None else x.roll(-self.num_noisy, -1) for x in keys)
        context = cache.num_columns
        if context and not (is_token is None and cache.token_mask is None):
            every = columns.new_ones(1, context + len(columns), dtype=torch.bool)
            is_token = _side_by_side(
                every[:, :context] if cache.token_mask is None else cache.token_mask,
                every[:, context:] if is_token is None else is_token,
            )
        columns, position_ids = (F.pad(x, (context, 0), value=-1) for x in (columns, position_ids))
        return _Keys(columns, position_ids, is_token)

    def _may_attend(self, queries: slice, keys: _Keys, is_causal: bool) -> torch.Tensor:
        """[B or 1, queries, keys] bool, the drawing above."""
        q, k = self.position_ids[:, queries, None], keys.position_ids[:, None]
        columns = torch.arange(queries.start or 0, queries.stop, device=q.device)[:, None]
        q_block, k_block = q // self.block_size, k // self.block_size
        mask = q >= k if is_causal else q_block >= k_block
        if self.num_noisy:
            q_is_noisy, k_is_noisy = columns < self.num_noisy, (keys.columns >= 0) & (keys.columns < self.num_noisy)
            block_diagonal = q_is_noisy & k_is_noisy & (q_block == k_block)
            offset_block_causal = q_is_noisy & ~k_is_noisy & (q_block > k_block)
            mask = block_diagonal | offset_block_causal | ~q_is_noisy & ~k_is_noisy & mask
        if keys.is_token is not None:  # a padding query keeps itself, for a softmax over nothing is NaN
            mask = mask & keys.is_token[:, None] | (columns == keys.columns)
        return mask

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the layout, in a fixed order."""
        return [x for x in (*self, *(part.mask for part in self.attention)) if isinstance(x, torch.Tensor)]

    def to_caller(self, hidden_states: torch.Tensor, *, noisy: bool) -> torch.Tensor:
        """Hidden states of one stream, noisy or clean, in the caller's columns [B, T, D]; 0 where not read."""
        tokens = self.position_ids.shape[1] - self.num_noisy
        if noisy and tokens and self.noisy_blocks is None:  # one block after the clean tokens, as the caller gave it
            return hidden_states
        if noisy and tokens and hidden_states.shape[1] != tokens:
            # some of the noisy blocks, or a last one that goes beyond the row
            batch, num_noisy, dim = hidden_states.shape
            index = self.position_ids[:, :num_noisy, None].expand(batch, -1, dim)
            whole = hidden_states.new_zeros(batch, -(-tokens // self.block_size) * self.block_size, dim)
            hidden_states = whole.scatter(1, index, hidden_states)[:, :tokens]
        if self.order is None:
            return hidden_states
        return hidden_states.gather(1, self.order.argsort(1)[..., None].expand_as(hidden_states))


def _align(x: torch.Tensor | None, order: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None or order is None else x.gather(1, order)


def _side_by_side(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Join [B or 1, n] and [B or 1, m]."""
    rows = max(len(a), len(b))
    return torch.cat((a.expand(rows, -1), b.expand(rows, -1)), 1)


def needed_blocks(needed: torch.Tensor | None, tokens: int, block_size: int, device) -> torch.Tensor:
    """Indices [B or 1, M] of the noisy blocks to read: all, or those with a True in needed [B, T].

    M is the largest number of such blocks in a row; rows with fewer read others as well.
    """
    num_blocks = -(-tokens // block_size)
    if needed is None:
        return torch.arange(num_blocks, device=device)[None]
    blocks = F.pad(needed, (0, num_blocks * block_size - tokens)).unflatten(1, (num_blocks, block_size)).any(-1)
    most = max(1, int(blocks.sum(1).max()))
    return blocks.int().argsort(dim=1, descending=True, stable=True)[:, :most].sort(1).values


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


def shift_right(noisy: torch.Tensor, clean: torch.Tensor, streams: Streams, cache: ArcLMCache | None) -> torch.Tensor:
    """Noisy hidden states [B, num_noisy, D] one position earlier; before a block comes the last clean token.

    The first token of a row has nothing before it and keeps its own.
    """
    previous = torch.cat((noisy[:, :1], noisy[:, :-1]), 1)
    position_ids = streams.position_ids[:, : streams.num_noisy, None].expand(len(noisy), -1, noisy.shape[-1])
    if cache is None and clean.shape[1]:
        last = (position_ids - 1).clamp(min=0, max=clean.shape[1] - 1)
        starts = (position_ids % streams.block_size == 0) & (position_ids > 0)
        return torch.where(starts, clean.gather(1, last), previous)
    if cache is not None and cache.last_hidden_state is not None:
        first = torch.where(position_ids[:, :1] > 0, cache.last_hidden_state, noisy[:, :1])
        return torch.cat((first, previous[:, 1:]), 1)
    return previous


def check_inputs(
    input_ids: torch.Tensor | None,
    noisy_input_ids: torch.Tensor | None,
    cache: ArcLMCache | None,
    needed: torch.Tensor | None,
    *,
    use_cache: bool | None,
    config,
    block_size: int,
) -> None:
    """Raise a ValueError that says what is allowed unless the inputs of a forward pass fit together.

    Labels of a clean stream that has read them already are allowed, and said.
    """
    if input_ids is None and noisy_input_ids is None:
        raise ValueError("Neither input_ids nor noisy_input_ids was given. Pass one of them, or both to train.")
    if not 1 <= block_size <= config.block_size:
        raise ValueError(f"block_size={block_size} is outside [1, {config.block_size}], up to the trained size.")
    for ids in (input_ids, noisy_input_ids):
        if ids is not None and (ids.ndim != 2 or not ids.numel()):
            raise ValueError(f"Token ids must be [batch, tokens] with at least one token, got {list(ids.shape)}.")
    ids = input_ids if noisy_input_ids is None else noisy_input_ids
    if needed is not None and needed.shape != ids.shape:
        raise ValueError(f"labels must be {list(ids.shape)}, one per token, got {list(needed.shape)}.")
    sees_ahead = config.context_attention == "block_causal" and block_size > 1
    if needed is not None and noisy_input_ids is None and sees_ahead:
        logger.warning_once(
            'labels without noisy_input_ids teach nothing under context_attention="block_causal": a token has read '
            "the rest of its block, its successor too. Train with train_bd3lm.py, or pass noisy_input_ids."
        )
    one_block = noisy_input_ids is not None and (input_ids is None or cache is not None)
    if one_block and ids.shape[1] > block_size:
        raise ValueError(
            f"noisy_input_ids has {ids.shape[1]} tokens, a denoising step reads one block of at most {block_size}. "
            "Pass the block alone, or without a cache input_ids of the same shape for all blocks in one pass."
        )
    if input_ids is not None and ids.shape != (input_ids.shape if cache is None else (len(input_ids), ids.shape[1])):
        raise ValueError(
            f"input_ids {list(input_ids.shape)} and noisy_input_ids {list(ids.shape)} must have the same shape: they "
            "are two views of the same rows. Only with a cache, where noisy_input_ids is the block after input_ids, "
            "may their lengths differ."
        )
    if cache is None:
        return
    if use_cache is False and input_ids is not None and noisy_input_ids is not None:
        raise ValueError("Two streams over a cache commit input_ids: leave use_cache=False out.")
    check_context(cache, len(ids), config, block_size)
    whole_blocks = input_ids is None or config.context_attention == "block_causal"
    if whole_blocks and cache.lengths is not None and (cache.lengths % block_size).any():
        raise ValueError(
            f"The cache holds {cache.lengths.tolist()} tokens per row, not multiples of block_size={block_size}. "
            "Commit whole blocks, and keep the rest of the prompt at the head of the next block."
        )


def clean_targets(
    clean_loss_weights: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    noisy_input_ids: torch.Tensor | None,
    labels: torch.Tensor | None,
    config,
) -> torch.Tensor | None:
    """What the clean stream is to predict [B, T]: at each position the next token, -100 where the weight is 0.

    `None` without weights. Raises a ValueError where its loss cannot be added to that of the noisy stream.
    """
    if clean_loss_weights is None:
        return None
    if config.context_attention != "causal":
        raise ValueError(
            f'clean_loss_weights do not go with context_attention="{config.context_attention}": the clean stream has '
            "read what it would have to predict. Convert the model with --context_attention causal."
        )
    if any(x is None or x.shape != clean_loss_weights.shape for x in (input_ids, noisy_input_ids, labels)):
        raise ValueError(
            f"clean_loss_weights {list(clean_loss_weights.shape)} want input_ids, noisy_input_ids and labels of the "
            "same shape. For an AR loss alone give input_ids, and as labels the next token of each position."
        )
    return F.pad(input_ids[:, 1:], (0, 1), value=-100).masked_fill(clean_loss_weights == 0, -100)
