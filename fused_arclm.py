"""Layers of a pass without gradients on a GPU in 16 bits, in a few Triton kernels each.

A denoising step reads 1.5 GB of weights in half a millisecond, but launches some 1,600 operations in plain PyTorch,
and each costs 2 us however small it is. Here a layer is 6 to 9 launches (`fused_layer`), and the delta rule of a block is
solved with matrix products instead of 64 steps one after the other (`delta_rule`).
"""

from typing import Any

import torch
from torch import nn

from .cache_arclm import ArcLMCache, CacheAccess, last_tokens
from .configuration_arclm import ArcLMConfig
from .kernels_arclm import CHECKS, _error, _normal_numbers, triton, usable
from .layers_arclm import ArcLMLinear
from .streams_arclm import Streams


# Tokens that the delta rule reads at once. With 64 Triton 3.6 takes Hopper's own matrix instructions for the triangular
# system, and writes beyond its shared memory.
MAX_CHUNK = 32
MAX_COLUMNS = 1024  # more are read faster by flash-linear-attention, once its kernels are tuned, which takes a minute
MAX_QUERIES = 256
FEW_ROWS = 64  # up to here a product waits for its weights, and is faster in one launch with what stands around it


if triton is not None:
    import triton.language as tl

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
        NORM: tl.constexpr,
        D: tl.constexpr,
        TAPS: tl.constexpr,
        T_TILE: tl.constexpr,
    ):
        """D channels, a head, at T_TILE tokens of one row; see `convolution`."""
        batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
        token = tl.program_id(0) * T_TILE + tl.arange(0, T_TILE)
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
        if NORM and head < num_keys:  # queries and keys
            total *= tl.rsqrt(tl.sum(total * total, 1) + 1e-6)[:, None]
        at = (batch * tokens + token)[:, None] * channels + channel[None, :]
        tl.store(output + at, total.to(output.dtype.element_ty), mask=(token < tokens)[:, None])

    @triton.jit
    def _unit_inverse(a, C: tl.constexpr):
        """(I + a)^{-1} of a strictly lower triangular a [C, C], C 16 or 32.

        Blocks of 4, then of 16, then both of these. What couples four solved blocks to one is nilpotent, n^4 = 0, so that
        (I + n)^{-1} = (I - n)(I + n^2). No power is higher than the third: those of `a` itself could overflow.
        """
        row = tl.arange(0, C)
        row, column = row[:, None], row[None, :]
        identity = tl.where(row == column, 1.0, 0.0)
        n = tl.where(row // 4 == column // 4, a, 0.0)
        inverse = tl.dot(identity - n, identity + tl.dot(n, n))
        n = tl.dot(inverse, tl.where((row // 16 == column // 16) & (row // 4 != column // 4), a, 0.0))
        inverse = tl.dot(tl.dot(identity - n, identity + tl.dot(n, n)), inverse)
        if C > 16:
            n = tl.dot(inverse, tl.where(row // 16 != column // 16, a, 0.0))  # of two: n^2 = 0
            inverse -= tl.dot(n, inverse)
        return inverse

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
        HAS_MASK: tl.constexpr,
        NEED_FINAL: tl.constexpr,
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
            token = start + row
            inside = token < tokens
            x = tl.load(a + token * gate_row, mask=inside, other=0.0).to(tl.float32) + bias
            beta = tl.sigmoid(tl.load(b + token * gate_row, mask=inside, other=0.0).to(tl.float32))
            e = tl.exp(x)
            # softplus; log(1 + e) would lose a small e
            g = -rate * tl.where(x > 20.0, x, tl.where(e < 1e-3, e - 0.5 * e * e, tl.log(1.0 + e)))
            is_read = inside
            if HAS_MASK:
                is_read = inside & (tl.load(is_token + batch * tokens + token, mask=inside, other=0) != 0)
            g, beta = tl.where(is_read, g, 0.0), tl.where(is_read, beta, 0.0)
            decay, total = tl.cumsum(g, 0), tl.sum(g, 0)
            fade = tl.where(row[:, None] >= row[None, :], tl.exp(decay[:, None] - decay[None, :]), 0.0)

            of_keys = token[:, None] * row_stride + key[None, :]
            keys = tl.load(k + of_keys, mask=inside[:, None], other=0.0)
            coupling = tl.dot(keys, tl.trans(keys)) * fade * beta[:, None]
            inverse = _unit_inverse(tl.where(row[:, None] > row[None, :], coupling, 0.0), C)
            s16 = s.to(keys.dtype)
            values = tl.load(v + token[:, None] * row_stride + value[None, :], mask=inside[:, None], other=0.0)
            rest = values.to(tl.float32) - tl.exp(decay)[:, None] * tl.dot(keys, s16)
            v_new = tl.dot(inverse, beta[:, None] * rest).to(keys.dtype)
            queries = tl.load(q + of_keys, mask=inside[:, None], other=0.0)
            weights = (tl.dot(queries, tl.trans(keys)) * fade).to(keys.dtype)
            out = (tl.exp(decay)[:, None] * tl.dot(queries, s16) + tl.dot(weights, v_new)) * K**-0.5
            of_output = token[:, None].to(tl.int64) * H * V + value[None, :]
            tl.store(output + of_output, out.to(output.dtype.element_ty), mask=inside[:, None])
            if NEED_FINAL or start + C < tokens:
                v_end = v_new * tl.exp(total - decay)[:, None]
                s = s * tl.exp(total) + tl.dot(tl.trans(keys), v_end.to(keys.dtype))
        if NEED_FINAL:
            tl.store(final_state + of_state, s)

    @triton.jit
    def _norm_kernel(x, weight, output, eps, D: tl.constexpr, D_TILE: tl.constexpr):
        """RMSNorm of one row [D]; the weight counts from 0."""
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, D_TILE)
        inside = column < D
        y = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
        y *= tl.rsqrt(tl.sum(y * y) / D + eps)
        y *= 1.0 + tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + row * D + column, y.to(output.dtype.element_ty), mask=inside)

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

    @triton.jit
    def _silu_mul_kernel(gate, up, output, size, TILE: tl.constexpr):
        """SiLU(gate) * up of TILE numbers."""
        at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        x = tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32)
        x *= tl.sigmoid(x) * tl.load(up + at, mask=at < size, other=0.0).to(tl.float32)
        tl.store(output + at, x.to(output.dtype.element_ty), mask=at < size)

    @triton.jit
    def _linear_kernel(
        x,
        norm,
        w0,
        w1,
        w2,
        w3,
        residual,
        output,
        rows,
        eps,
        N0: tl.constexpr,
        N1: tl.constexpr,
        N2: tl.constexpr,
        N3: tl.constexpr,
        D: tl.constexpr,
        NORM: tl.constexpr,
        GATED: tl.constexpr,
        ADD: tl.constexpr,
        M_TILE: tl.constexpr,
        N_TILE: tl.constexpr,
        D_TILE: tl.constexpr,
    ):
        """N_TILE columns of up to four products of all rows; see `linear`."""
        tile = tl.program_id(0)
        T0: tl.constexpr = (N0 + N_TILE - 1) // N_TILE
        T1: tl.constexpr = T0 + (0 if GATED else (N1 + N_TILE - 1) // N_TILE)
        T2: tl.constexpr = T1 + (N2 + N_TILE - 1) // N_TILE
        w, first, size, at = w0, tile * N_TILE, N0, 0
        if tile >= T0:
            w, first, size, at = w1, (tile - T0) * N_TILE, N1, N0
        if tile >= T1 and not GATED:
            w, first, size, at = w2, (tile - T1) * N_TILE, N2, N0 + N1
        if tile >= T2 and not GATED:
            w, first, size, at = w3, (tile - T2) * N_TILE, N3, N0 + N1 + N2
        row, column, inner = tl.arange(0, M_TILE), first + tl.arange(0, N_TILE), tl.arange(0, D_TILE)
        in_x, in_w = (row < rows)[:, None], (column < size)[:, None]
        x_at, w_at = row[:, None] * D + inner[None, :], column[:, None] * D + inner[None, :]
        total = tl.zeros((M_TILE, N_TILE), tl.float32)
        total_up = tl.zeros((M_TILE, N_TILE), tl.float32)
        squares = tl.zeros((M_TILE,), tl.float32)
        for start in range(0, D, D_TILE):
            y = tl.load(x + x_at + start, mask=in_x, other=0.0)
            if NORM:  # x / |x| W = (x W) / |x|
                wide = y.to(tl.float32)
                squares += tl.sum(wide * wide, 1)
                y = (wide * (1.0 + tl.load(norm + start + inner).to(tl.float32))[None, :]).to(y.dtype)
            total = tl.dot(y, tl.trans(tl.load(w + w_at + start, mask=in_w, other=0.0)), total)
            if GATED:
                total_up = tl.dot(y, tl.trans(tl.load(w1 + w_at + start, mask=in_w, other=0.0)), total_up)
        if NORM:
            scale = tl.rsqrt(squares / D + eps)[:, None]
            total, total_up = total * scale, total_up * scale
        if GATED:
            total *= tl.sigmoid(total) * total_up
        out_row: tl.constexpr = N0 if GATED else N0 + N1 + N2 + N3
        out_at = row[:, None] * out_row + at + column[None, :]
        inside = in_x & (column < size)[None, :]
        if ADD:
            total += tl.load(residual + out_at, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + out_at, total.to(output.dtype.element_ty), mask=inside)

    @triton.jit
    def _query_key_kernel(
        query_gate,
        key,
        cos,
        sin,
        query_weight,
        key_weight,
        queries,
        keys,
        query_row,
        key_row,
        rotary_batch,
        eps,
        tokens,
        H: tl.constexpr,
        KEY_HEADS: tl.constexpr,
        D: tl.constexpr,
        ROTARY: tl.constexpr,
    ):
        """RMSNorm and rotary embedding of one query or key [D]."""
        token, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        d = tl.arange(0, D)
        source, weight = query_gate + (batch * tokens + token) * query_row + head * 2 * D, query_weight
        # the query heads of a key head stand one after the other as its queries
        target = queries + ((batch * H + head) * tokens + token) * D
        if head >= H:
            source, weight = key + (batch * tokens + token) * key_row + (head - H) * D, key_weight
            target = keys + ((batch * KEY_HEADS + head - H) * tokens + token) * D
        x = tl.load(source + d).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x) / D + eps)
        half: tl.constexpr = ROTARY // 2
        partner = tl.where(d < half, d + half, tl.where(d < ROTARY, d - half, d))
        other = tl.load(source + partner).to(tl.float32) * (1.0 + tl.load(weight + partner).to(tl.float32))
        x *= 1.0 + tl.load(weight + d).to(tl.float32)
        angle = batch * rotary_batch + token * ROTARY + d
        c = tl.load(cos + angle, mask=d < ROTARY, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=d < ROTARY, other=0.0).to(tl.float32)
        x = (x * c + tl.where(d < half, -other, other) * s) * scale
        tl.store(target + d, x.to(target.dtype.element_ty))

    @triton.jit(do_not_specialize=["columns", "split_size"])
    def _attention_kernel(
        queries,
        keys,
        values,
        mask,
        partial,
        statistics,
        rows,
        tokens,
        columns,
        split_size,
        key_batch,
        key_head,
        key_row,
        value_batch,
        value_head,
        value_row,
        mask_batch,
        mask_row,
        scale,
        KEY_HEADS: tl.constexpr,
        D: tl.constexpr,
        HAS_MASK: tl.constexpr,
        M_TILE: tl.constexpr,
        N_TILE: tl.constexpr,
    ):
        """M_TILE queries of one key head over one split of its keys; see `attention`."""
        split, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
        row, d = tl.program_id(0) * M_TILE + tl.arange(0, M_TILE), tl.arange(0, D)
        token, inside = row % tokens, row < rows
        batch, key_of = head // KEY_HEADS, head % KEY_HEADS
        keys, values = keys + batch * key_batch + key_of * key_head, values + batch * value_batch + key_of * value_head
        q = tl.load(queries + (head * rows + row)[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        highest = tl.full((M_TILE,), -1e30, tl.float32)
        total = tl.zeros((M_TILE,), tl.float32)
        result = tl.zeros((M_TILE, D), tl.float32)
        stop = tl.minimum((split + 1) * split_size, columns)
        for start in range(split * split_size, stop, N_TILE):
            column = start + tl.arange(0, N_TILE)
            is_key = column < stop
            at = column[:, None].to(tl.int64)
            k = tl.load(keys + at * key_row + d[None, :], mask=is_key[:, None], other=0.0)
            visible = inside[:, None] & is_key[None, :]
            if HAS_MASK:
                of_mask = batch * mask_batch + token[:, None] * mask_row + column[None, :]
                visible = visible & (tl.load(mask + of_mask, mask=visible, other=0) != 0)
            scores = tl.where(visible, tl.dot(q, tl.trans(k)) * scale, -1e30)
            higher = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.where(visible, tl.exp(scores - higher[:, None]), 0.0)
            fade = tl.exp(highest - higher)
            v = tl.load(values + at * value_row + d[None, :], mask=is_key[:, None], other=0.0)
            result = tl.dot(weights.to(v.dtype), v, result * fade[:, None])
            total, highest = total * fade + tl.sum(weights, 1), higher
        cell = (split * tl.num_programs(2) + head) * rows + row
        tl.store(partial + cell[:, None] * D + d[None, :], result, mask=inside[:, None])
        size = tl.num_programs(1).to(tl.int64) * tl.num_programs(2) * rows
        tl.store(statistics + cell, highest, mask=inside)
        tl.store(statistics + size + cell, total, mask=inside)

    @triton.jit
    def _attention_output_kernel(
        partial, statistics, query_gate, output, query_row, tokens, splits, H: tl.constexpr, D: tl.constexpr
    ):
        """Join the splits of one query, and gate."""
        token, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        d, size = tl.arange(0, D), tl.num_programs(2).to(tl.int64) * H * tokens
        cell = (batch * H + head) * tokens + token
        highest = -1e30
        for split in range(splits):
            highest = tl.maximum(highest, tl.load(statistics + split * size + cell))
        total, result = 0.0, tl.zeros((D,), tl.float32)
        for split in range(splits):
            at = split * size + cell
            weight = tl.exp(tl.load(statistics + at) - highest)
            total += weight * tl.load(statistics + splits * size + at)
            result += weight * tl.load(partial + at * D + d)
        gate = tl.load(query_gate + (batch * tokens + token) * query_row + head * 2 * D + D + d).to(tl.float32)
        result = result / total * tl.sigmoid(gate)
        at = ((batch * tokens + token) * H + head) * D + d
        tl.store(output + at, result.to(output.dtype.element_ty))


def convolution(
    mixed: torch.Tensor, history: torch.Tensor, weight: torch.Tensor, *, head_dim: int, num_keys: int, normalise: bool
) -> torch.Tensor:
    """`ArcLMConv1d` of [history ; mixed], heads below `num_keys` (the queries and keys) normalised to length 1.

    Args:
        mixed: [B, T, channels], the last dimension contiguous.
        history: [B, taps - 1, channels] contiguous.
        weight: [channels, 1, taps].
        head_dim: channels of a head, a power of 2.
        num_keys: how many heads are queries and keys.
        normalise: whether they are normalised.

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
        NORM=normalise,
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
    token_mask: torch.Tensor | None = None,
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
    final = torch.empty_like(state) if need_final else state
    b, a = gates
    tile = min(32 if batch * heads <= 64 else 64, value_dim)
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
        C=min(MAX_CHUNK, max(16, triton.next_power_of_2(tokens))),
        V_TILE=tile,
        HAS_MASK=token_mask is not None,
        NEED_FINAL=need_final,
        num_warps=4,
    )
    return output, final if need_final else None


def linear(
    x: torch.Tensor,
    layers: list[nn.Linear],
    *,
    norm: nn.Module | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The products of the rows of x with up to four weights side by side, in one launch.

    Args:
        x: [rows, D] contiguous, at most 64 rows.
        layers: without bias.
        norm: an RMSNorm of x before.
        gated: whether to multiply SiLU of the first product by the second.
        residual: [rows, N], is added.

    Returns:
        [rows, N] in the dtype of x, N all columns, or with `gated` those of one weight.
    """
    (rows, dim), weights = x.shape, [layer.weight for layer in layers]
    sizes = [len(weight) for weight in weights] + [0] * (4 - len(weights))
    columns = sizes[0] if gated else sum(sizes)
    output = x.new_empty(rows, columns)
    tile = next((tile for tile in (64, 32) if columns // tile >= 100), 16)
    _linear_kernel[(sum(triton.cdiv(size, tile) for size in sizes[: 1 if gated else 4]),)](
        x,
        x if norm is None else norm.weight,
        *weights,
        *[weights[0]] * (4 - len(weights)),
        x if residual is None else residual,
        output,
        rows,
        0.0 if norm is None else norm.eps,
        *sizes,
        D=dim,
        NORM=norm is not None,
        GATED=gated,
        ADD=residual is not None,
        M_TILE=max(16, triton.next_power_of_2(rows)),
        N_TILE=tile,
        D_TILE=next(tile for tile in (64, 32, 16) if dim % tile == 0),
        num_warps=4,
        num_stages=4,
    )
    return output


def rms_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """`Qwen3_5RMSNorm` of the rows of x [rows, D]."""
    dim, output = x.shape[1], torch.empty_like(x)
    tile = triton.next_power_of_2(dim)
    _norm_kernel[(len(x),)](
        x, norm.weight, output, norm.eps, D=dim, D_TILE=tile, num_warps=max(1, min(8, tile // 256))
    )
    return output


def gated_norm(x: torch.Tensor, gate: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """`ArcLMRMSNormGated` of x [rows, H, Vd] with gate [rows, H * Vd], whose last dimension is contiguous."""
    rows, heads, value_dim = x.shape
    output = torch.empty_like(x)
    _gated_norm_kernel[(rows, heads)](
        x, gate, norm.weight, output, gate.stride(0), norm.eps, H=heads, V=value_dim, num_warps=1
    )
    return output


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * up, all contiguous and of one shape."""
    output = torch.empty_like(gate)
    _silu_mul_kernel[(triton.cdiv(gate.numel(), 1024),)](gate, up, output, gate.numel(), TILE=1024, num_warps=4)
    return output


def query_key(
    query_gate: torch.Tensor, key: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], attention: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm and rotary embedding of queries and keys.

    Args:
        query_gate: [B, L, H * 2 * D], what `q_proj` gives, the last dimension contiguous.
        key: [B, L, Hkv * D], what `k_proj` gives.
        rotary: cosine and sine, each [B or 1, L, rotary_dim] contiguous.
        attention: an `ArcLMAttention`.

    Returns:
        Queries [B, Hkv, H / Hkv * L, D] and keys [B, Hkv, L, D].
    """
    (batch, tokens, _), dim, (cos, sin) = key.shape, attention.head_dim, rotary
    key_heads = key.shape[2] // dim
    heads = query_gate.shape[2] // (2 * dim)
    queries = key.new_empty(batch, key_heads, heads // key_heads * tokens, dim)
    keys = key.new_empty(batch, key_heads, tokens, dim)
    _query_key_kernel[(tokens, heads + key_heads, batch)](
        query_gate,
        key,
        cos,
        sin,
        attention.q_norm.weight,
        attention.k_norm.weight,
        queries,
        keys,
        query_gate.stride(1),
        key.stride(1),
        0 if len(cos) == 1 else cos.stride(0),
        attention.q_norm.eps,
        tokens,
        H=heads,
        KEY_HEADS=key_heads,
        D=dim,
        ROTARY=cos.shape[2],
        num_warps=1,
    )
    return queries, keys


def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    query_gate: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Softmax attention of few queries, and its gate. The keys are split: a block has too few queries for a GPU.

    Args:
        queries: [B, Hkv, G * L, D] contiguous, the G query heads of a key head one after the other.
        keys: [B, Hkv, S, D], the last dimension contiguous.
        values: like keys.
        mask: [B or 1, 1, L, S] bool, True where a query may attend to a key; `None` where all may.
        query_gate: [B, L, H * 2 * D], what `q_proj` gives: for each head the query, then the gate.
        scale: of the scores.

    Returns:
        [B, L, H * D].
    """
    (batch, key_heads, rows, dim), columns = queries.shape, keys.shape[2]
    tokens, heads = query_gate.shape[1], query_gate.shape[2] // (2 * dim)
    m_tile, n_tile = min(64, max(16, triton.next_power_of_2(rows))), 32
    tiles = triton.cdiv(rows, m_tile) * batch * key_heads
    splits = max(1, min(8, triton.cdiv(128, tiles), triton.cdiv(columns, 2 * n_tile)))
    split_size = triton.cdiv(triton.cdiv(columns, splits), n_tile) * n_tile
    splits = triton.cdiv(columns, split_size)
    partial = torch.empty(splits, batch, key_heads, rows, dim, device=queries.device)
    statistics = torch.empty(2, splits, batch, key_heads, rows, device=queries.device)
    _attention_kernel[(triton.cdiv(rows, m_tile), splits, batch * key_heads)](
        queries,
        keys,
        values,
        mask,
        partial,
        statistics,
        rows,
        tokens,
        columns,
        split_size,
        *keys.stride()[:3],
        *values.stride()[:3],
        0 if mask is None or len(mask) == 1 else mask.stride(0),
        0 if mask is None else mask.stride(2),
        scale,
        KEY_HEADS=key_heads,
        D=dim,
        HAS_MASK=mask is not None,
        M_TILE=m_tile,
        N_TILE=n_tile,
        num_warps=8,
        num_stages=2,
    )
    output = queries.new_empty(batch, tokens, heads * dim)
    _attention_output_kernel[(tokens, heads, batch)](
        partial, statistics, query_gate, output, query_gate.stride(1), tokens, splits, H=heads, D=dim, num_warps=1
    )
    return output


def _products(x: torch.Tensor, layers: list[nn.Linear], norm: nn.Module) -> list[torch.Tensor]:
    """The norm of x [rows, D] and its products with several weights, each [rows, N], the last dimension contiguous."""
    if len(x) <= FEW_ROWS:
        return list(linear(x, layers, norm=norm).split([layer.out_features for layer in layers], 1))
    normed = rms_norm(x, norm)
    return [layer(normed) for layer in layers]


def _add_product(x: torch.Tensor, layer: nn.Linear, residual: torch.Tensor) -> torch.Tensor:
    """residual + layer(x), [rows, N]."""
    if len(x) <= FEW_ROWS:
        return linear(x, [layer], residual=residual)
    return torch.addmm(residual, x, layer.weight.T)


def _delta_net(net: nn.Module, norm: nn.Module, x: torch.Tensor, batch: int, streams: Streams, access) -> torch.Tensor:
    """`ArcLMGatedDeltaNet` up to `out_proj`, of its normed input; x and the result [B * columns, ...]."""
    layers = [net.in_proj_qkv, net.in_proj_z, net.in_proj_b, net.in_proj_a]
    mixed, gate, b, a = (y.unflatten(0, (batch, -1)) for y in _products(x, layers, norm))
    cache, split, outputs = None if access is None else access.cache, streams.num_noisy, []
    history = None if cache is None else cache.conv_states[net.layer_idx]
    state = None if cache is None else cache.recurrent_states[net.layer_idx]
    heads, key_heads = len(net.A_log), net.key_dim // net.head_k_dim
    if history is None:
        history = mixed.new_zeros(batch, net.kernel - 1, mixed.shape[-1])
        state = mixed.new_zeros(batch, heads, net.head_k_dim, net.head_v_dim, dtype=torch.float32)

    def read(columns: slice, token_mask: torch.Tensor | None, need_final: bool) -> torch.Tensor | None:
        of_heads = {"head_dim": net.head_k_dim, "num_keys": 2 * key_heads, "normalise": True}
        qkv = convolution(mixed[:, columns], history, net.conv1d.weight, **of_heads)
        gates, decay = (b[:, columns], a[:, columns]), (net.A_log, net.dt_bias)
        output, final = delta_rule(qkv, gates, decay, state, token_mask, key_heads=key_heads, need_final=need_final)
        outputs.append(output)
        return final

    if split < mixed.shape[1]:
        state = read(slice(split, None), streams.token_mask, need_final=True)
        padded = torch.cat((history, mixed[:, split:]), 1)
        history = last_tokens(padded, net.kernel - 1, streams.token_mask)
    if split:
        read(slice(split), None, need_final=False)
    if access is not None and access.commit:
        cache.conv_states[net.layer_idx], cache.recurrent_states[net.layer_idx] = history, state
    output = torch.cat(outputs[::-1], 1) if outputs[1:] else outputs[0]
    return gated_norm(output.flatten(0, 1), gate.flatten(0, 1), net.norm).flatten(1)


def _attend(layer: nn.Module, norm: nn.Module, x: torch.Tensor, batch: int, streams: Streams, access) -> torch.Tensor:
    """`ArcLMAttention` up to `o_proj`, of its normed input; x and the result [B * columns, ...]."""
    products = _products(x, [layer.q_proj, layer.k_proj, layer.v_proj], norm)
    query_gate, key, value = (y.unflatten(0, (batch, -1)) for y in products)
    queries, keys = query_key(query_gate, key, (streams.cos, streams.sin), layer)
    values = value.unflatten(2, (-1, layer.head_dim)).transpose(1, 2)
    if access is not None:
        keys, values = access.update(keys, values, layer.layer_idx)
    (part,) = streams.attention
    return attention(queries, keys, values, part.mask, query_gate, layer.scaling).flatten(0, 1)


def fused_layer(
    layer: nn.Module, hidden_states: torch.Tensor, streams: Streams, access: CacheAccess | None
) -> torch.Tensor:
    """`ArcLMDecoderLayer` without gradients: hidden states [B, columns, D] to hidden states."""
    batch, mlp = len(hidden_states), layer.mlp
    x = hidden_states.flatten(0, 1).contiguous()
    if layer.is_linear:
        mixer, mix = layer.linear_attn, _delta_net
        project = mixer.out_proj
    else:
        mixer, mix = layer.self_attn, _attend
        project = mixer.o_proj
    x = _add_product(mix(mixer, layer.input_layernorm, x, batch, streams, access), project, x)
    norm = layer.post_attention_layernorm
    if len(x) <= FEW_ROWS:
        y = linear(x, [mlp.gate_proj, mlp.up_proj], norm=norm, gated=True)
    else:
        normed = rms_norm(x, norm)
        y = silu_mul(mlp.gate_proj(normed), mlp.up_proj(normed))
    return _add_product(y, mlp.down_proj, x).view(hidden_states.shape)


# what the kernels are compiled for
FIELDS = (
    "hidden_size",
    "intermediate_size",
    "hidden_act",
    "rms_norm_eps",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
)


def use_fused_layer(layer: nn.Module, config: Any, hidden_states: torch.Tensor, streams: Streams) -> bool:
    """Whether `fused_layer` takes these hidden states [B, columns, D]: 16 bits, few columns, and nobody looks on."""
    dtype, device = hidden_states.dtype, hidden_states.device
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.is_grad_enabled() or layer.training or torch.is_autocast_enabled("cuda"):
        return False
    if streams.noisy_blocks is not None or hidden_states.shape[1] > (MAX_COLUMNS if layer.is_linear else MAX_QUERIES):
        return False
    if not layer.is_linear and (len(streams.attention) > 1 or config._attn_implementation != "sdpa"):
        return False
    if not _is_plain(layer, dtype, device):
        return False
    return usable("fused_layer", device, type(layer), dtype, layer.is_linear, *(getattr(config, x) for x in FIELDS))


def _is_plain(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the layer is what its class made: no hook, no adapter, nothing quantised, no bias."""
    for module in layer.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
        if isinstance(module, nn.Linear) and (
            type(module).forward not in (nn.Linear.forward, ArcLMLinear.forward)
            or type(module.weight) is not nn.Parameter
            or (module.weight.dtype, module.weight.device, module.bias) != (dtype, device, None)
        ):
            return False
        if type(module).__module__.startswith("peft."):
            return False
    return True


def _fits(config: Any) -> bool:
    """Whether the kernels have tiles for these shapes."""
    powers = (config.head_dim, config.linear_key_head_dim, config.linear_value_head_dim)
    return (
        config.hidden_act == "silu"
        and all(16 <= x <= 256 and x & (x - 1) == 0 for x in powers)
        and config.linear_key_head_dim == config.linear_value_head_dim <= 128
        and all(x % 16 == 0 for x in (config.hidden_size, config.intermediate_size))
    )


def _check_fused_layer(device: torch.device, layer_class: type, dtype: torch.dtype, is_linear: bool, *fields) -> float:
    """A commit of 72 tokens, that of a block of one row with a denoising step of both, and another step, in float32."""
    kind = "linear_attention" if is_linear else "full_attention"
    config = ArcLMConfig(**dict(zip(FIELDS, fields, strict=True)), num_hidden_layers=1, layer_types=[kind])
    config._attn_implementation = "sdpa"
    if not _fits(config):
        raise ValueError("there are no tiles for the shapes of this model")
    normal, results = _normal_numbers(device), []
    layer = layer_class(config, 0).to(device).eval()
    for parameter in layer.parameters():
        parameter.copy_(normal(*parameter.shape) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3))
    inputs = [normal(2, columns, config.hidden_size).to(dtype) for columns in (72, 24, 12)]
    layer = layer.to(dtype)
    for run, cast in ((fused_layer, dtype), (layer_class.forward, torch.float32)):
        cache, layer = ArcLMCache(1), layer.to(cast)
        mask = torch.ones(2, 12, dtype=torch.long, device=device)
        mask[1] = 0
        for x, (clean, noisy) in zip(inputs, ((72, 0), (12, 12), (0, 12)), strict=True):
            ids = [torch.zeros(2, n, dtype=torch.long, device=device) if n else None for n in (clean, noisy)]
            cache.lengths = torch.full((2,), cache.num_columns, device=device) if cache.num_columns else None
            padding = mask if clean == noisy else None
            _, streams = Streams.of(*ids, padding, block_size=12, cache=cache)
            streams = streams.for_layers(config, cache, cast)
            access = CacheAccess(cache, streams.num_noisy, clean > 0)
            results.append(run(layer, x.to(cast), streams, access).float())
            cache.num_columns += clean
            cache.token_mask = None if clean == 72 else torch.ones(2, 84, dtype=torch.bool, device=device)
        results += [x.float() for x in (cache.keys + cache.recurrent_states) if x is not None]
    half = len(results) // 2
    return _error(tuple(results[:half]), tuple(results[half:]))


CHECKS["fused_layer"] = (_check_fused_layer, 3e-2)
