"""The gated delta rule of transformers' PyTorch path, made fast for short rows on a CPU.

Same result as `torch_chunk_gated_delta_rule` (arXiv:2412.06464), whose triangular solves take a large part of a
training step on a CPU. Here a chunk is shorter and its triangular matrix is inverted by matrix products. Used by
`nano/pretrain.py` only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5


CHUNK_SIZE = 24


class UnitLowerInverse(torch.autograd.Function):
    """Inverse of I + L, L strictly lower triangular: (I - L)(I + L^2)(I + L^4)..., exact since L is nilpotent."""

    @staticmethod
    def forward(ctx, lower: Tensor) -> Tensor:
        """Invert. `lower`: [..., C, C], the strictly lower part L."""
        size = lower.shape[-1]
        power = -lower
        inverse = power + torch.eye(size, dtype=lower.dtype)
        for _ in range((size - 1).bit_length() - 1):
            power = power @ power
            inverse = inverse + power @ inverse
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """Gradient of L. `grad`: [..., C, C], the gradient of the inverse."""
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return -(transposed @ grad @ transposed).tril(-1)


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gated delta rule chunk by chunk, with L2-normalised queries and keys.

    Args:
        query: [B, T, heads, dim_k], `key` alike.
        key: see `query`.
        value: [B, T, heads, dim_v], as many heads as `query`.
        g: [B, T, heads] log decay, <= 0.
        beta: [B, T, heads] write strength in (0, 1).
        initial_state: [B, heads, dim_k, dim_v], or None for zeros.
        output_final_state: whether to return the state after the last token.
        kwargs: the other arguments of the transformers function, which have one value here.

    Returns:
        [B, T, heads, dim_v] outputs, and the final state or None.
    """
    tokens = query.shape[1]
    dtype = query.dtype
    pad = -tokens % CHUNK_SIZE

    def chunked(x: Tensor) -> Tensor:
        """[B, T, heads, ...] -> [B, heads, N, C, ...], padded with zeros, which neither decay nor write."""
        x = F.pad(x.float(), (0, 0) * (x.dim() - 2) + (0, pad)).unflatten(1, (-1, CHUNK_SIZE))
        return x.permute(0, 3, 1, 2, *range(4, x.dim()))

    query = chunked(F.normalize(query.float(), dim=-1, eps=1e-6) * query.shape[-1] ** -0.5)
    key = chunked(F.normalize(key.float(), dim=-1, eps=1e-6))
    value, beta, g = chunked(value), chunked(beta).unsqueeze(-1), chunked(g).cumsum(-1)

    causal = torch.ones(CHUNK_SIZE, CHUNK_SIZE, dtype=torch.bool).tril()
    # only differences <= 0 reach exp
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()
    g = g.unsqueeze(-1)
    key_beta = key * beta
    inverse = UnitLowerInverse.apply(((key_beta @ key.transpose(-1, -2)) * decay).tril(-1))
    new_value = inverse @ (value * beta)
    state_key = inverse @ (key_beta * g.exp())
    scores = (query @ key.transpose(-1, -2)) * decay
    query = query * g.exp()
    key = (key * (g[..., -1:, :] - g).exp()).transpose(-1, -2)
    last = g[..., -1:, :].exp()

    state = value.new_zeros(*key.shape[:2], key.shape[-2], value.shape[-1]) if initial_state is None else initial_state
    chunks = []
    for n in range(query.shape[2]):
        written = new_value[:, :, n] - state_key[:, :, n] @ state
        chunks.append(query[:, :, n] @ state + scores[:, :, n] @ written)
        state = state * last[:, :, n] + key[:, :, n] @ written
    output = torch.stack(chunks, 2).flatten(2, 3)[:, :, :tokens].transpose(1, 2)
    return output.to(dtype), state if output_final_state else None


def install() -> None:
    """Make transformers' Qwen3.5 use this delta rule."""
    modeling_qwen3_5.torch_chunk_gated_delta_rule = chunk_gated_delta_rule
