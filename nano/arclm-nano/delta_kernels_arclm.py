"""Triton kernels of a Gated DeltaNet layer without gradients: convolution, delta rule, gated norm.

The recurrence and its chunks are those of `gated_delta_rule.py`. There all chunks of a row are computed at once, for
training; here one program reads a head's chunks one after the other and keeps the state in registers, for a block.
"""

import torch
from torch import nn

from .kernels_arclm import tl, triton


# Tokens that the delta rule reads at once. With 16 a block of 64 took 8.9 us, with 32 12.3 (an H100, one row); with 64
# Triton 3.6 takes Hopper's own matrix instructions for the triangular system, and writes beyond its shared memory.
CHUNK = 16


if triton is not None:

    @triton.jit(do_not_specialize=["tokens"])
    def _convolution_kernel(
        mixed,
        history,
        weight,
        output,
        tokens,
        mixed_batch,
        mixed_row,
        channels,
        num_keys,
        D: tl.constexpr,
        TAPS: tl.constexpr,
        T_TILE: tl.constexpr,
    ):
        """D channels, a head, at T_TILE tokens of one row; see `convolution`."""
        batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
        token = tl.program_id(0).to(tl.int64) * T_TILE + tl.arange(0, T_TILE)
        channel = head * D + tl.arange(0, D)
        mixed, history = mixed + batch * mixed_batch, history + batch * (TAPS - 1) * channels
        total = tl.zeros((T_TILE, D), tl.float32)
        for tap in tl.static_range(TAPS):
            source = token + tap - (TAPS - 1)
            is_old, is_new = (source < 0)[:, None], ((source >= 0) & (source < tokens))[:, None]
            old = tl.load(history + (source + TAPS - 1)[:, None] * channels + channel[None, :], mask=is_old, other=0.0)
            new = tl.load(mixed + source[:, None] * mixed_row + channel[None, :], mask=is_new, other=0.0)
            total += (old + new).to(tl.float32) * tl.load(weight + channel * TAPS + tap).to(tl.float32)[None, :]
        total *= tl.sigmoid(total)
        if head < num_keys:  # queries and keys
            total *= tl.rsqrt(tl.sum(total * total, 1) + 1e-6)[:, None]
        at = (batch * tokens + token)[:, None] * channels + channel[None, :]
        tl.store(output + at, total.to(output.dtype.element_ty), mask=(token < tokens)[:, None])

    @triton.jit
    def _unit_inverse(a):
        """(I + a)^{-1} of a strictly lower triangular a [16, 16].

        Blocks of 4, then all. What couples four solved blocks to one is nilpotent, n^4 = 0, so that
        (I + n)^{-1} = (I - n)(I + n^2). No power is higher than the third: those of `a` itself could overflow.
        """
        row = tl.arange(0, 16)
        row, column = row[:, None], row[None, :]
        identity = tl.where(row == column, 1.0, 0.0)
        n = tl.where(row // 4 == column // 4, a, 0.0)
        inverse = tl.dot(identity - n, identity + tl.dot(n, n))
        n = tl.dot(inverse, tl.where(row // 4 != column // 4, a, 0.0))
        return tl.dot(tl.dot(identity - n, identity + tl.dot(n, n)), inverse)

    @triton.jit
    def _softplus(x):
        e = tl.exp(x)  # log(1 + e) would lose a small one
        return tl.where(x > 20.0, x, tl.where(e < 1e-3, e - 0.5 * e * e, tl.log(1.0 + e)))

    @triton.jit
    def inverse_of(keys, beta, fade, row):
        """(I + tril(beta k k^T fade, -1))^{-1} of a chunk [16, 16]."""
        coupling = tl.dot(keys, tl.trans(keys)) * fade * beta[:, None]
        return _unit_inverse(tl.where(row[:, None] > row[None, :], coupling, 0.0))

    @triton.jit
    def read_chunk(queries, keys, values, s, decay, total, fade, beta, row):
        """Outputs of a chunk and what it writes [C, V], and the state after it, from the state s [K, V] before it."""
        s16 = s.to(keys.dtype)
        rest = beta[:, None] * (values.to(tl.float32) - tl.exp(decay)[:, None] * tl.dot(keys, s16))
        u = tl.dot(inverse_of(keys, beta, fade, row), rest).to(keys.dtype)
        weights = (tl.dot(queries, tl.trans(keys)) * fade).to(keys.dtype)
        output = (tl.exp(decay)[:, None] * tl.dot(queries, s16) + tl.dot(weights, u)) * queries.shape[1] ** -0.5
        # after the last chunk too: under a condition, Triton 3.6 on Hopper reads keys that are overwritten already
        at_end = (u * tl.exp(total - decay)[:, None]).to(keys.dtype)
        return output, u, s * tl.exp(total) + tl.dot(tl.trans(keys), at_end)

    @triton.jit(do_not_specialize=["tokens"])
    def _delta_rule_kernel(
        qkv,
        a,
        b,
        A_log,
        dt_bias,
        is_token,
        state,
        output,
        final_state,
        tokens,
        gate_batch,
        gate_row,
        H: tl.constexpr,
        KEY_HEADS: tl.constexpr,
        K: tl.constexpr,
        V: tl.constexpr,
        C: tl.constexpr,
        V_TILE: tl.constexpr,
    ):
        """V_TILE values of one head of one row; see `delta_rule`."""
        batch, head = tl.program_id(1).to(tl.int64) // H, tl.program_id(1) % H
        row, key = tl.arange(0, C), tl.arange(0, K)
        value = tl.program_id(0) * V_TILE + tl.arange(0, V_TILE)
        row_stride = 2 * KEY_HEADS * K + H * V
        q = qkv + batch * tokens * row_stride + (head // (H // KEY_HEADS)) * K
        k, v = q + KEY_HEADS * K, qkv + batch * tokens * row_stride + 2 * KEY_HEADS * K + head * V
        a, b = a + batch * gate_batch + head, b + batch * gate_batch + head
        output = output + batch * tokens * H * V + head * V
        of_state = ((batch * H + head) * K + key[:, None]) * V + value[None, :]
        s = tl.load(state + of_state)
        rate, bias = tl.exp(tl.load(A_log + head).to(tl.float32)), tl.load(dt_bias + head).to(tl.float32)
        for start in range(0, tokens, C):
            token = (start + row).to(tl.int64)
            inside = token < tokens
            x = tl.load(a + token * gate_row, mask=inside, other=0.0).to(tl.float32) + bias
            g = -rate * _softplus(x)
            beta = tl.sigmoid(tl.load(b + token * gate_row, mask=inside, other=0.0).to(tl.float32))
            is_read = inside
            if is_token is not None:
                is_read = inside & (tl.load(is_token + batch * tokens + token, mask=inside, other=0) != 0)
            g, beta = tl.where(is_read, g, 0.0), tl.where(is_read, beta, 0.0)
            decay, total = tl.cumsum(g, 0), tl.sum(g, 0)
            fade = tl.where(row[:, None] >= row[None, :], tl.exp(decay[:, None] - decay[None, :]), 0.0)

            of_keys = token[:, None] * row_stride + key[None, :]
            keys = tl.load(k + of_keys, mask=inside[:, None], other=0.0)
            values = tl.load(v + token[:, None] * row_stride + value[None, :], mask=inside[:, None], other=0.0)
            queries = tl.load(q + of_keys, mask=inside[:, None], other=0.0)
            out, _, s = read_chunk(queries, keys, values, s, decay, total, fade, beta, row)
            of_output = token[:, None] * H * V + value[None, :]
            tl.store(output + of_output, out.to(output.dtype.element_ty), mask=inside[:, None])
        if final_state is not None:
            tl.store(final_state + of_state, s)

    @triton.jit
    def _gated_norm_kernel(x, gate, weight, output, gate_row, eps, H: tl.constexpr, V: tl.constexpr):
        """RMSNorm and SiLU gate of one row [H, V]."""
        row = tl.program_id(0).to(tl.int64)
        head, value = tl.program_id(1), tl.arange(0, V)
        y = tl.load(x + (row * H + head) * V + value).to(tl.float32)
        z = tl.load(gate + row * gate_row + head * V + value).to(tl.float32)
        y *= tl.rsqrt(tl.sum(y * y) / V + eps) * tl.load(weight + value).to(tl.float32)
        y *= z * tl.sigmoid(z)
        tl.store(output + (row * H + head) * V + value, y.to(output.dtype.element_ty))


def convolution(
    mixed: torch.Tensor, history: torch.Tensor, weight: torch.Tensor, *, head_dim: int, num_keys: int
) -> torch.Tensor:
    """`ArcLMConv1d` of [history ; mixed], heads below `num_keys` (the queries and keys) normalised to length 1.

    Args:
        mixed: [B, T, channels], the last dimension contiguous.
        history: [B, taps - 1, channels] contiguous.
        weight: [channels, 1, taps].
        head_dim: channels of a head, a power of 2.
        num_keys: how many heads are queries and keys.

    Returns:
        [B, T, channels] in the dtype of `mixed`.
    """
    batch, tokens, channels = mixed.shape
    output = mixed.new_empty(batch, tokens, channels)
    tile = 8 if tokens <= 64 else 32
    _convolution_kernel[(triton.cdiv(tokens, tile), channels // head_dim, batch)](
        mixed,
        history,
        weight,
        output,
        tokens,
        mixed.stride(0),
        mixed.stride(1),
        channels,
        num_keys,
        D=head_dim,
        TAPS=weight.shape[-1],
        T_TILE=tile,
        num_warps=2,
    )
    return output


def delta_rule(
    qkv: torch.Tensor,
    gates: tuple[torch.Tensor, torch.Tensor],
    decay: tuple[torch.Tensor, torch.Tensor],
    state: torch.Tensor,
    token_mask: torch.Tensor | None,
    *,
    key_heads: int,
    need_final: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule of a few chunks, as `gated_delta_rule.py`: one program per head and piece of its values.

    Products are of 16 bits, but for the triangular system, which is solved in TF32; sums and the state are float32.

    Args:
        qkv: [B, T, channels] contiguous, from `convolution`, queries and keys normalised.
        gates: `in_proj_b` and `in_proj_a` of the tokens, each [B, T, H].
        decay: A_log and dt_bias, each [H].
        state: [B, H, K, Vd] float32 contiguous.
        token_mask: [B, T] bool, False for padding, which leaves the state as it is.
        key_heads: heads of the queries and keys.
        need_final: whether to return the state after the last token.

    Returns:
        [B, T, H, Vd] in the dtype of `qkv`, and the final state or `None`.
    """
    (batch, tokens, _), (_, heads, key_dim, value_dim) = qkv.shape, state.shape
    output = qkv.new_empty(batch, tokens, heads, value_dim)
    final = torch.empty_like(state) if need_final else None
    b, a = gates
    tile = min(32, value_dim)
    _delta_rule_kernel[(value_dim // tile, batch * heads)](
        qkv,
        a,
        b,
        *decay,
        token_mask if token_mask is None else token_mask.contiguous(),
        state,
        output,
        final,
        tokens,
        a.stride(0),
        a.stride(1),
        H=heads,
        KEY_HEADS=key_heads,
        K=key_dim,
        V=value_dim,
        C=CHUNK,
        V_TILE=tile,
        num_warps=4,
    )
    return output, final


def gated_norm(x: torch.Tensor, gate: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """`ArcLMRMSNormGated` of x [rows, H, Vd] with gate [rows, H * Vd], whose last dimension is contiguous."""
    rows, heads, value_dim = x.shape
    output = torch.empty_like(x)
    _gated_norm_kernel[(rows, heads)](
        x, gate, norm.weight, output, gate.stride(0), norm.eps, H=heads, V=value_dim, num_warps=1
    )
    return output
