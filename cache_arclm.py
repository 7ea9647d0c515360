"""The cache of a hybrid model under block diffusion: written by commits, read by denoising steps."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class ArcLMCache:
    """What the committed (clean) tokens of a batch leave behind, layer by layer.

    A commit writes it, a denoising step reads it. Rows may hold different numbers of tokens.

    Memory: per token 2 * Hkv * head_dim numbers in the model dtype for each full-attention layer, and up to a quarter
    more as room; per row H * K * Vd float32 numbers and (kernel - 1) * conv_dim in the model dtype for each
    linear-attention layer. For Qwen3.5-0.8B in bfloat16: 12,288 bytes per token and 19.5 MB per row.

    Fields:
        keys, values: per full-attention layer [B, Hkv, S, head_dim], rotated, in the model dtype; `None` elsewhere.
            Each is a view with room for more columns behind it (`append`).
        conv_states: per linear-attention layer [B, kernel - 1, conv_dim], the last inputs of the convolution.
        recurrent_states: per linear-attention layer [B, H, K, Vd] float32, the delta-rule memory S.
        lengths: [B] committed tokens of each row.
        token_mask: [B, S] bool, which columns of keys and values are tokens; `None` where all are.
        token_ids: [B, S] the committed tokens, and padding.
        block_size: tokens per block, `None` while it is empty.
        last_hidden_state: [B, 1, D] final hidden state of the last committed token.
    """

    def __init__(self, num_layers: int):
        self.keys: list[torch.Tensor | None] = [None] * num_layers
        self.values: list[torch.Tensor | None] = [None] * num_layers
        self.conv_states: list[torch.Tensor | None] = [None] * num_layers
        self.recurrent_states: list[torch.Tensor | None] = [None] * num_layers
        self.lengths: torch.Tensor | None = None
        self.token_mask: torch.Tensor | None = None
        self.token_ids: torch.Tensor | None = None
        self.last_hidden_state: torch.Tensor | None = None
        self.block_size: int | None = None
        self.num_columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed tokens of the longest row."""
        return 0 if self.lengths is None else int(self.lengths.max())

    def row_token_ids(self, row: int) -> torch.Tensor:
        """The committed tokens of a row, [n]."""
        return self.token_ids[row] if self.token_mask is None else self.token_ids[row][self.token_mask[row]]

    def advance(
        self,
        token_mask: torch.Tensor | None,
        token_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        block_size: int,
    ) -> None:
        """Record a commit of the tokens [B, T] that `token_mask` marks, with their final hidden states [B, T, D]."""
        batch, tokens, _ = hidden_states.shape
        every = torch.ones(batch, tokens, dtype=torch.bool, device=hidden_states.device)
        if self.token_mask is not None or token_mask is not None:
            old = every[:, :1].expand(-1, self.num_columns) if self.token_mask is None else self.token_mask
            self.token_mask = torch.cat((old, every if token_mask is None else token_mask), 1)
        self.token_ids = token_ids if self.token_ids is None else torch.cat((self.token_ids, token_ids), 1)
        lengths = (every if token_mask is None else token_mask).sum(1)
        last = last_tokens(F.pad(hidden_states, (0, 0, 1, 0)), 1, token_mask)
        if self.last_hidden_state is not None:  # a row without new tokens keeps its own
            last = torch.where((lengths > 0)[:, None, None], last, self.last_hidden_state)
        self.last_hidden_state = last
        self.lengths = lengths if self.lengths is None else self.lengths + lengths
        self.num_columns += tokens
        self.block_size = block_size


def check_context(cache: Any, batch_size: int, config, block_size: int) -> None:
    """Raise ValueError unless what was passed as `past_key_values` fits a model of `config`, these rows and blocks."""
    # remote code may define the class twice, so ask what it has and not what it is
    if not hasattr(cache, "token_ids"):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}. Pass one that `generate` or the model returned."
        )
    if len(cache.keys) != config.num_hidden_layers:
        raise ValueError(
            f"past_key_values has {len(cache.keys)} layers, this model {config.num_hidden_layers}. "
            "A cache can only be used by the model that made it."
        )
    if cache.lengths is not None and len(cache.lengths) != batch_size:
        raise ValueError(
            f"past_key_values holds {len(cache.lengths)} rows, the input {batch_size}. Use one row per cached row."
        )
    if config.context_attention == "block_causal" and cache.block_size not in (None, block_size):
        raise ValueError(
            f"past_key_values was made with block_size={cache.block_size}, and this call has {block_size}. A token "
            "attends to the rest of its block, so the cache depends on it: use the same, or no cache."
        )


class CacheAccess(NamedTuple):
    """The cache as the layers of one forward pass see it.

    Fields:
        cache: the context.
        num_noisy: columns of the noisy stream, the first ones, which are never kept.
        commit: whether the columns of the clean stream are kept.
    """

    cache: ArcLMCache
    num_noisy: int
    commit: bool

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, Hkv, S + columns, head_dim] of context, clean stream and noisy stream in this order.

        `ArcLMAttention` calls it.
        """
        joined = []
        for kept, new in ((self.cache.keys, key), (self.cache.values, value)):
            context = kept[layer_idx]
            if 0 < self.num_noisy < new.shape[2]:
                new = torch.cat((new[:, :, self.num_noisy :], new[:, :, : self.num_noisy]), 2)
            whole = append(context, new)
            if self.commit:
                kept[layer_idx] = whole[:, :, : whole.shape[2] - self.num_noisy]
            elif context is not None and not whole.requires_grad:  # the same columns, which may have got room
                kept[layer_idx] = whole[:, :, : context.shape[2]]
            joined.append(whole)
        return tuple(joined)


def append(context: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """Join context [B, H, S, D] and new columns [B, H, n, D] without copying the context where it has room behind it.

    The new columns are written into that room, beyond what `context` shows, so a denoising step changes no column of
    the cache. Where there is no room, all is copied to a place with a quarter more than needed.
    """
    if context is None:
        return new
    if torch.is_grad_enabled() and (new.requires_grad or context.requires_grad):  # writing would break the graph
        return torch.cat((context, new), 2)
    batch, heads, columns, dim = context.shape
    length = columns + new.shape[2]
    has_room = context.stride(1) >= length * dim  # the distance of two heads
    if not has_room or context.is_inference() != torch.is_inference_mode_enabled():  # torch forbids to mix these
        room = context.new_empty(batch, heads, length + length // 4, dim)
        room[:, :, :columns] = context
        context = room
    whole = context.as_strided((batch, heads, length, dim), context.stride())
    whole[:, :, columns:] = new
    return whole


def last_tokens(x: torch.Tensor, count: int, token_mask: torch.Tensor | None) -> torch.Tensor:
    """The last `count` rows before the padding: [B, count, D] of x [B, count + T, D], whose last T rows are masked."""
    if token_mask is None:
        return x[:, x.shape[1] - count :].clone()  # a view would keep all of x in memory
    index = token_mask.sum(1, keepdim=True) + torch.arange(count, device=x.device)  # [B, count]
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
