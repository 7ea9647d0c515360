"""Softmax attention whose queries may be cut into parts, each over the keys that it can see.

One dense mask over both streams is [2T, 2T], and three quarters of it are False. In parts of some hundred queries the
masks together, and the products, are about a third of that.
"""

from typing import NamedTuple

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5Attention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .cache_arclm import CacheAccess
from .configuration_arclm import ArcLMConfig


class AttentionPart(NamedTuple):
    """Some of the queries, and the keys that at least one of them sees.

    Fields:
        queries: columns of the pass.
        keys: one or two slices of the keys, side by side.
        mask: [B or 1, 1, queries, keys], True (0.0 for eager attention) where a query may attend to a key; `None`
            where every query may attend to every key.
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: torch.Tensor | None


class ArcLMAttention(Qwen3_5Attention):
    """Qwen3.5's gated attention in parts.

    The query heads that share a key head stand one after the other as its queries: transformers would repeat the keys
    and values for each of them wherever there is a mask.
    """

    def __init__(self, config: ArcLMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.query_groups, self.num_key_value_groups = self.num_key_value_groups, 1

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        parts: tuple[AttentionPart, ...],
        access: CacheAccess | None,
    ) -> torch.Tensor:
        """Map the columns [B, columns, D] of one or both streams to as many, which attend as `parts` say."""
        query, key, value, gate = self.project(hidden_states, position_embeddings)
        if access is not None:
            key, value = access.update(key, value, self.layer_idx)
        return self.attend(query, key, value, gate, parts)

    def project(self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> tuple:
        """Queries [B, H, columns, D], keys and values [B, Hkv, columns, D] and gate [B, columns, H, D]."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, gate = self.q_proj(hidden_states).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, -1)
        query = self.q_norm(query).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        return query, key, value, gate

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gate: torch.Tensor,
        parts: tuple[AttentionPart, ...],
    ) -> torch.Tensor:
        """Attention in parts, gate and output product of what `project` gives, the keys maybe after a context."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        outputs, of_keys = [], tuple(part.keys for part in parts)
        pieces = (
            _Cut.apply(query, tuple((part.queries,) for part in parts)),
            *(_Cut.apply(x, of_keys) for x in (key, value)),
        )
        for part, queries, keys, values in zip(parts, *pieces, strict=True):
            queries = queries.unflatten(1, (-1, self.query_groups)).flatten(2, 3)
            # for this layer alone: the masks of a pass are kept through all of its layers
            mask = None if part.mask is None else part.mask.repeat(1, 1, self.query_groups, 1)
            # is_causal=False: the mask says it all, and without one every key is visible
            output, _ = attend(
                self, queries, keys, values, mask, dropout=dropout, scaling=self.scaling, is_causal=False
            )
            outputs.append(output.unflatten(1, (self.query_groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3))
        output = torch.cat(outputs, 1) if outputs[1:] else outputs[0]  # [B, columns, H, head_dim]
        return self.o_proj((output * gate.sigmoid()).flatten(2))


class _Cut(torch.autograd.Function):
    """Columns of [B, H, S, head_dim] for each part.

    Many parts read the same keys. Their gradient is added up in one tensor, in float32; autograd would make a tensor
    of S columns for each slice.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, parts: tuple[tuple[slice, ...], ...]) -> tuple[torch.Tensor, ...]:
        ctx.shape, ctx.parts, ctx.dtype = x.shape, parts, x.dtype
        return tuple(_columns(x, slices) for slices in parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: torch.Tensor) -> tuple:
        dtype = torch.promote_types(ctx.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=dtype, device=grads[0].device)
        for grad, slices in zip(grads, ctx.parts, strict=True):
            own = [total[:, :, part] for part in slices]
            for columns, piece in zip(own, grad.split([x.shape[2] for x in own], 2), strict=True):
                columns += piece
        return total.to(ctx.dtype), None


def _columns(x: torch.Tensor, slices: tuple[slice, ...]) -> torch.Tensor:
    """Take columns of [B, H, S, head_dim]."""
    return torch.cat([x[:, :, part] for part in slices], 2) if slices[1:] else x[:, :, slices[0]]
