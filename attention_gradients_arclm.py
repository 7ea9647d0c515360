"""Triton kernels with gradients of what stands between the products of a full-attention layer and its attention."""

import torch
from torch import nn

from .attention_kernels_arclm import query_key
from .kernels_arclm import row_stride, tl, triton


TOKEN_TILE = 16


if triton is not None:

    @triton.jit(do_not_specialize=["tokens", "rotary_batch"])
    def _query_key_gradients_kernel(
        query_gate,
        key,
        cos,
        sin,
        query_weight,
        key_weight,
        grad_queries,
        grad_keys,
        grad_gate,
        grad_query_gate,
        grad_key,
        grad_weights,
        rotary_batch,
        eps,
        tokens,
        H: tl.constexpr,
        KEY_HEADS: tl.constexpr,
        D: tl.constexpr,
        ROTARY: tl.constexpr,
        T_TILE: tl.constexpr,
    ):
        """The gradients of T_TILE tokens of one head of queries or keys, and of the gate of the queries."""
        tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        token, d = tile * T_TILE + tl.arange(0, T_TILE), tl.arange(0, D)
        inside = (token < tokens)[:, None]
        source, target, weight = query_gate, grad_query_gate, query_weight
        of_source = (batch * tokens + token)[:, None] * (2 * H * D) + head * 2 * D + d[None, :]
        grad, of_grad = grad_queries, ((batch * H + head) * tokens + token)[:, None] * D
        if head >= H:
            source, target, weight, grad = key, grad_key, key_weight, grad_keys
            of_source = (batch * tokens + token)[:, None] * (KEY_HEADS * D) + (head - H) * D + d[None, :]
            of_grad = ((batch * KEY_HEADS + head - H) * tokens + token)[:, None] * D
        half: tl.constexpr = ROTARY // 2
        partner = tl.where(d < half, d + half, tl.where(d < ROTARY, d - half, d))
        angle, is_rotary = batch * rotary_batch + token[:, None] * ROTARY, (d < ROTARY)[None, :] & inside
        c = tl.load(cos + angle + d[None, :], mask=is_rotary, other=1.0).to(tl.float32)
        s = tl.load(sin + angle + partner[None, :], mask=is_rotary, other=0.0).to(tl.float32)
        dy = tl.load(grad + of_grad + d[None, :], mask=inside, other=0.0).to(tl.float32)
        other = tl.load(grad + of_grad + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = dy * c + tl.where((d < half)[None, :], other, -other) * s
        x = tl.load(source + of_source, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x *= scale
        part = ((batch * tl.num_programs(0) + tile) * (H + KEY_HEADS) + head) * D
        tl.store(grad_weights + part + d, tl.sum(dy * x, 0))
        dy *= 1.0 + tl.load(weight + d).to(tl.float32)[None, :]
        dx = (dy - x * (tl.sum(dy * x, 1) / D)[:, None]) * scale
        tl.store(target + of_source, dx.to(target.dtype.element_ty), mask=inside)
        if head < H:
            at = ((batch * tokens + token)[:, None] * H + head) * D + d[None, :]
            gate = tl.load(grad_gate + at, mask=inside, other=0.0)
            tl.store(grad_query_gate + of_source + D, gate, mask=inside)


class _QueryKey(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_gate, key, query_weight, key_weight, rotary, layer: nn.Module) -> tuple:
        query_gate, key, rotary = query_gate.contiguous(), key.contiguous(), tuple(x.contiguous() for x in rotary)
        ctx.eps, ctx.dim = layer.q_norm.eps, layer.head_dim
        ctx.save_for_backward(query_gate, key, query_weight, key_weight, *rotary)
        queries, keys = query_key(query_gate, key, rotary, layer)
        gate = query_gate.unflatten(2, (-1, 2 * ctx.dim))[..., ctx.dim :].contiguous()
        return queries.view(len(key), -1, key.shape[1], ctx.dim), keys, gate

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: torch.Tensor) -> tuple:
        query_gate, key, query_weight, key_weight, cos, sin = ctx.saved_tensors
        (batch, tokens, _), dim = key.shape, ctx.dim
        heads, key_heads = query_gate.shape[2] // (2 * dim), key.shape[2] // dim
        grad_query_gate, grad_key = torch.empty_like(query_gate), torch.empty_like(key)
        tiles = triton.cdiv(tokens, TOKEN_TILE)
        parts = torch.empty(batch * tiles, heads + key_heads, dim, dtype=torch.float32, device=key.device)
        _query_key_gradients_kernel[(tiles, heads + key_heads, batch)](
            *(query_gate, key, cos, sin, query_weight, key_weight),
            *(grad.contiguous() for grad in grads),
            *(grad_query_gate, grad_key, parts),
            *(row_stride(cos), ctx.eps, tokens),
            H=heads,
            KEY_HEADS=key_heads,
            D=dim,
            ROTARY=cos.shape[2],
            T_TILE=TOKEN_TILE,
            num_warps=4,
        )
        parts = parts.sum(0)
        grad_weights = parts[:heads].sum(0).to(query_weight.dtype), parts[heads:].sum(0).to(key_weight.dtype)
        return grad_query_gate, grad_key, *grad_weights, None, None


def rotated(
    query_gate: torch.Tensor, key: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], layer: nn.Module
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norm and rotary embedding of queries and keys, as `ArcLMAttention` computes them.

    Args:
        query_gate: [B, L, H * 2 * D], what `q_proj` gives: for each head the query, then the gate.
        key: [B, L, Hkv * D], what `k_proj` gives.
        rotary: cosine and sine, each [B or 1, L, rotary_dim].
        layer: an `ArcLMAttention`.

    Returns:
        Queries [B, H, L, D], keys [B, Hkv, L, D] and the gate [B, L, H, D].
    """
    return _QueryKey.apply(query_gate, key, layer.q_norm.weight, layer.k_norm.weight, rotary, layer)
