"""Triton kernels of a full-attention layer without gradients: norm, rotary embedding, attention of a block, gate."""

import torch
from torch import nn

from .kernels_arclm import row_stride, tl, triton


SPLITS, PROGRAMS = 16, 256  # of the keys at most, and programs to share the work of few queries


if triton is not None:

    @triton.jit(do_not_specialize=["tokens"])
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

    @triton.jit(do_not_specialize=["rows", "tokens", "columns", "mask_batch", "mask_row"])
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
        M_TILE: tl.constexpr,
        N_TILE: tl.constexpr,
    ):
        """M_TILE queries of one key head over every so many tiles of its keys; see `attention`."""
        split, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
        row, d = tl.program_id(0) * M_TILE + tl.arange(0, M_TILE), tl.arange(0, D)
        token, inside = row % tokens, row < rows
        batch, key_of = head // KEY_HEADS, head % KEY_HEADS
        keys, values = keys + batch * key_batch + key_of * key_head, values + batch * value_batch + key_of * value_head
        q = tl.load(queries + (head * rows + row)[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        highest = tl.full((M_TILE,), -1e30, tl.float32)
        total = tl.zeros((M_TILE,), tl.float32)
        result = tl.zeros((M_TILE, D), tl.float32)
        # every so many tiles: what is masked lies together, and is left out
        for start in range(split * N_TILE, columns, tl.num_programs(1) * N_TILE):
            column = start + tl.arange(0, N_TILE)
            is_key = column < columns
            visible = inside[:, None] & is_key[None, :]
            if mask is not None:
                of_mask = batch * mask_batch + token[:, None] * mask_row + column[None, :]
                visible = visible & (tl.load(mask + of_mask, mask=visible, other=0) != 0)
            if tl.max(tl.max(visible.to(tl.int32), 1), 0) > 0:
                at = column[:, None].to(tl.int64)
                k = tl.load(keys + at * key_row + d[None, :], mask=is_key[:, None], other=0.0)
                v = tl.load(values + at * value_row + d[None, :], mask=is_key[:, None], other=0.0)
                scores = tl.where(visible, tl.dot(q, tl.trans(k)) * scale, -1e30)
                higher = tl.maximum(highest, tl.max(scores, 1))
                weights = tl.where(visible, tl.exp(scores - higher[:, None]), 0.0)
                fade = tl.exp(highest - higher)
                result = tl.dot(weights.to(v.dtype), v, result * fade[:, None])
                total, highest = total * fade + tl.sum(weights, 1), higher
        cell = (split * tl.num_programs(2) + head) * rows + row
        tl.store(partial + cell[:, None] * D + d[None, :], result, mask=inside[:, None])
        size = tl.num_programs(1).to(tl.int64) * tl.num_programs(2) * rows
        tl.store(statistics + cell, highest, mask=inside)
        tl.store(statistics + size + cell, total, mask=inside)

    @triton.jit(do_not_specialize=["tokens", "splits"])
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
        row_stride(cos),
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
    m_tile, n_tile = min(32, max(16, triton.next_power_of_2(rows))), 32
    tiles = triton.cdiv(rows, m_tile) * batch * key_heads
    splits = max(1, min(SPLITS, triton.cdiv(PROGRAMS, tiles), triton.cdiv(columns, n_tile)))
    partial = torch.empty(splits, batch, key_heads, rows, dim, dtype=torch.float32, device=queries.device)
    statistics = torch.empty(2, splits, batch, key_heads, rows, dtype=torch.float32, device=queries.device)
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
        *keys.stride()[:3],
        *values.stride()[:3],
        0 if mask is None else row_stride(mask),
        0 if mask is None else mask.stride(2),
        scale,
        KEY_HEADS=key_heads,
        D=dim,
        M_TILE=m_tile,
        N_TILE=n_tile,
        num_warps=4,
        num_stages=2,
    )
    output = queries.new_empty(batch, tokens, heads * dim)
    _attention_output_kernel[(tokens, heads, batch)](
        partial, statistics, query_gate, output, query_gate.stride(1), tokens, splits, H=heads, D=dim, num_warps=1
    )
    return output
