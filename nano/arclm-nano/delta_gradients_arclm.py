"""Triton kernels of the gated delta rule over two streams, with its gradient: what `gated_delta_rule.py` computes.

A sequence is the clean stream of a row, or a noisy block, which starts from one of the states of the clean stream. Two
kernels walk through the chunks of a sequence with the state in registers, or with its gradient on the way back, and
leave what they pass. With that a third one computes the gradients of all chunks at once.

With G the decay accumulated in a chunk, F_ij = e^{G_i - G_j} for i >= j, and S the state before it, the forward pass
of a chunk of C tokens is

    A = tril(beta k k^T F, -1)      u = (I + A)^{-1} beta (v - e^G k S)
    o = (e^G q S + (q k^T F) u) / sqrt(D)      S' = e^{G_C} S + (e^{G_C - G} k)^T u

and backwards, with do and dS' given,

    du = (q k^T F)^T do / sqrt(D) + e^{G_C - G} k dS'      dr = (I + A)^{-T} du      dv = beta dr      dA = -dr u^T
    dS = e^{G_C} dS' + (e^G q)^T do / sqrt(D) - (beta e^G k)^T dr
"""

from typing import NamedTuple

import torch

from .delta_kernels_arclm import CHUNK
from .kernels_arclm import row_stride, tl, triton


WALK_TILE, GRADIENT_TILE = 32, 16  # values that a program reads at once: more do not fit into the registers


if triton is not None:
    from .delta_kernels_arclm import inverse_of, read_chunk

    @triton.jit
    def _place_of(parts, H: tl.constexpr, tokens, first, columns, per_row):
        """Part, head and sequence of a program; the sequence's row, number there, and first column of all rows'."""
        program = tl.program_id(0).to(tl.int64)
        part, head, sequence = program % parts, (program // parts) % H, program // parts // H
        batch, number = sequence // per_row, sequence % per_row
        return part, head, sequence, batch, number, batch * columns + first + number * tokens

    @triton.jit
    def _decay_of(gates, at, inside, row, H: tl.constexpr):
        """Accumulated decay [C], the whole of it, beta [C], and the decay from key to row [C, C] of a chunk."""
        log_decay = tl.load(gates + at, mask=inside, other=0.0)
        decay, total = tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)
        fade = tl.where(row[:, None] >= row[None, :], tl.exp(decay[:, None] - decay[None, :]), 0.0)
        return decay, total, tl.load(gates + at + H, mask=inside, other=0.0), fade

    @triton.jit(do_not_specialize=["tokens", "chunks", "first", "columns", "per_row", "num_blocks", "blocks_row"])
    def _forward_kernel(
        qkv,
        gates,
        blocks,
        boundaries,
        output,
        written,
        states,
        tokens,
        chunks,
        first,
        columns,
        per_row,
        num_blocks,
        blocks_row,
        H: tl.constexpr,
        KEY_HEADS: tl.constexpr,
        D: tl.constexpr,
        C: tl.constexpr,
        V_TILE: tl.constexpr,
        CHUNKS_PER_BLOCK: tl.constexpr,
    ):
        """V_TILE values of one head of a sequence: outputs, what is written, states before chunks, and blocks."""
        part, head, sequence, batch, number, begin = _place_of(D // V_TILE, H, tokens, first, columns, per_row)
        row, key, value = tl.arange(0, C), tl.arange(0, D), part * V_TILE + tl.arange(0, V_TILE)
        channels: tl.constexpr = 2 * KEY_HEADS * D + H * D
        q = qkv + begin * channels + (head // (H // KEY_HEADS)) * D
        k, v = q + KEY_HEADS * D, qkv + begin * channels + 2 * KEY_HEADS * D + head * D
        gates = gates + begin * 2 * H + head
        output, written = output + (begin * H + head) * D, written + (begin * H + head) * D
        of_state = head * D * D + key[:, None] * D + value[None, :]
        s = tl.zeros((D, V_TILE), tl.float32)
        if blocks is not None:
            block = tl.load(blocks + batch * blocks_row + number)
            s = tl.load(boundaries + (batch * num_blocks + block) * H * D * D + of_state)
        for chunk in range(chunks):
            if states is not None:
                before = s.to(qkv.dtype.element_ty)
                tl.store(states + (sequence * chunks + chunk) * H * D * D + of_state, before)
            if blocks is None:
                block = chunk // CHUNKS_PER_BLOCK
                if chunk % CHUNKS_PER_BLOCK == 0:
                    tl.store(boundaries + (batch * num_blocks + block) * H * D * D + of_state, s)
            token, inside = chunk * C + row, chunk * C + row < tokens
            decay, total, b, fade = _decay_of(gates, token * 2 * H, inside, row, H)
            of_keys = token[:, None] * channels + key[None, :]
            keys = tl.load(k + of_keys, mask=inside[:, None], other=0.0)
            values = tl.load(v + token[:, None] * channels + value[None, :], mask=inside[:, None], other=0.0)
            queries = tl.load(q + of_keys, mask=inside[:, None], other=0.0)
            out, u, s = read_chunk(queries, keys, values, s, decay, total, fade, b, row)
            of_output = token[:, None] * H * D + value[None, :]
            tl.store(output + of_output, out.to(output.dtype.element_ty), mask=inside[:, None])
            tl.store(written + of_output, u, mask=inside[:, None])

    @triton.jit(do_not_specialize=["tokens", "chunks", "first", "columns", "per_row", "num_noisy", "places_row"])
    def _backward_kernel(
        qkv,
        gates,
        places,
        grad_boundaries,
        grad_output,
        grad_rest,
        grad_states,
        grad_initial,
        tokens,
        chunks,
        first,
        columns,
        per_row,
        num_noisy,
        places_row,
        H: tl.constexpr,
        KEY_HEADS: tl.constexpr,
        D: tl.constexpr,
        C: tl.constexpr,
        V_TILE: tl.constexpr,
        CHUNKS_PER_BLOCK: tl.constexpr,
    ):
        """From the last chunk to the first, the gradient of the state after each, and dr."""
        part, head, sequence, batch, _, begin = _place_of(D // V_TILE, H, tokens, first, columns, per_row)
        row, key, value = tl.arange(0, C), tl.arange(0, D), part * V_TILE + tl.arange(0, V_TILE)
        channels: tl.constexpr = 2 * KEY_HEADS * D + H * D
        q = qkv + begin * channels + (head // (H // KEY_HEADS)) * D
        k, gates = q + KEY_HEADS * D, gates + begin * 2 * H + head
        grad_output, grad_rest = grad_output + (begin * H + head) * D, grad_rest + (begin * H + head) * D
        of_state = head * D * D + key[:, None] * D + value[None, :]
        ds = tl.zeros((D, V_TILE), tl.float32)
        for step in range(chunks):
            chunk = chunks - 1 - step
            if places is not None:
                after = chunk + 1  # a noisy block may begin here
                begins = (after % CHUNKS_PER_BLOCK == 0) & (after < chunks)
                place = tl.load(places + batch * places_row + after // CHUNKS_PER_BLOCK, mask=begins, other=-1)
                if place >= 0:
                    ds += tl.load(grad_boundaries + (batch * num_noisy + place) * H * D * D + of_state)
            ds16 = ds.to(qkv.dtype.element_ty)
            tl.store(grad_states + (sequence * chunks + chunk) * H * D * D + of_state, ds16)
            token, inside = chunk * C + row, chunk * C + row < tokens
            decay, total, b, fade = _decay_of(gates, token * 2 * H, inside, row, H)
            of_keys = token[:, None] * channels + key[None, :]
            keys = tl.load(k + of_keys, mask=inside[:, None], other=0.0)
            queries = tl.load(q + of_keys, mask=inside[:, None], other=0.0)
            of_output = token[:, None] * H * D + value[None, :]
            do = tl.load(grad_output + of_output, mask=inside[:, None], other=0.0)
            weights = tl.dot(queries, tl.trans(keys)) * fade * D**-0.5
            du = tl.dot(tl.trans(weights.to(keys.dtype)), do)
            du += tl.exp(total - decay)[:, None] * tl.dot(keys, ds16)
            dr = tl.dot(tl.trans(inverse_of(keys, b, fade, row)), du)
            tl.store(grad_rest + of_output, dr.to(keys.dtype), mask=inside[:, None])
            dr *= (b * tl.exp(decay))[:, None]
            ds = ds * tl.exp(total) - tl.dot(tl.trans(keys), dr.to(keys.dtype))
            ds += tl.dot(tl.trans(queries), (do * (tl.exp(decay) * D**-0.5)[:, None]).to(keys.dtype))
        if grad_initial is not None:
            tl.store(grad_initial + sequence * H * D * D + of_state, ds)

    @triton.jit
    def _with_state(state, grad_output, grad_rest, inside, H: tl.constexpr, D: tl.constexpr, C, V_TILE: tl.constexpr):
        """do S^T and dr S^T of one head of a chunk [C, D]."""
        row, key = tl.arange(0, C), tl.arange(0, D)
        from_output, from_rest = tl.zeros((C, D), tl.float32), tl.zeros((C, D), tl.float32)
        for start in range(0, D, V_TILE):
            value = start + tl.arange(0, V_TILE)
            of_values = row[:, None] * H * D + value[None, :]
            s = tl.load(state + key[None, :] * D + value[:, None])
            do = tl.load(grad_output + of_values, mask=inside[:, None], other=0.0)
            from_output = tl.dot(do, s, from_output)
            dr = tl.load(grad_rest + of_values, mask=inside[:, None], other=0.0)
            from_rest = tl.dot(dr, s, from_rest)
        return from_output, from_rest

    @triton.jit
    def _with_written(
        written, state, grad_state, grad_output, grad_rest, inside, H: tl.constexpr, D: tl.constexpr, C, V_TILE
    ):
        """u dS'^T [C, D], <S, dS'>, and do u^T and dr u^T [C, C] of one head of a chunk."""
        row, key = tl.arange(0, C), tl.arange(0, D)
        from_state, kept = tl.zeros((C, D), tl.float32), tl.zeros((V_TILE, D), tl.float32)
        of_weights, of_system = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
        for start in range(0, D, V_TILE):
            value = start + tl.arange(0, V_TILE)
            of_values, of_state = row[:, None] * H * D + value[None, :], key[None, :] * D + value[:, None]
            u = tl.load(written + of_values, mask=inside[:, None], other=0.0)
            ds = tl.load(grad_state + of_state)
            kept += tl.load(state + of_state).to(tl.float32) * ds.to(tl.float32)
            from_state = tl.dot(u, ds, from_state)
            do = tl.load(grad_output + of_values, mask=inside[:, None], other=0.0)
            of_weights = tl.dot(do, tl.trans(u), of_weights)
            dr = tl.load(grad_rest + of_values, mask=inside[:, None], other=0.0)
            of_system = tl.dot(dr, tl.trans(u), of_system)
        return from_state, tl.sum(kept), of_weights, of_system

    @triton.jit
    def _of_values(qkv, grad_qkv, first, grad_rest, b, inside, channels, H: tl.constexpr, D: tl.constexpr, C):
        """Write dv = beta dr of one head of a chunk; returns dr v [C]."""
        row, value = tl.arange(0, C), tl.arange(0, D)
        at = row[:, None] * channels + first + value[None, :]
        dr = tl.load(grad_rest + row[:, None] * H * D + value[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        tl.store(grad_qkv + at, (dr * b[:, None]).to(grad_qkv.dtype.element_ty), mask=inside[:, None])
        return tl.sum(dr * tl.load(qkv + at, mask=inside[:, None], other=0.0).to(tl.float32), 1)

    @triton.jit
    def _within(d_weights, d_system, queries, keys, fade, b, row):
        """Gradients of q, k, beta and G through q k^T F and the system tril(beta k k^T F, -1)."""
        d_weights = d_weights * fade
        d_system = tl.where(row[:, None] > row[None, :], -d_system * fade, 0.0)
        coupling = tl.dot(keys, tl.trans(keys))
        d_beta = tl.sum(d_system * coupling, 1)
        d_system *= b[:, None]
        faded = d_weights * tl.dot(queries, tl.trans(keys)) + d_system * coupling
        d_weights, d_system = d_weights.to(keys.dtype), d_system.to(keys.dtype)
        dk = tl.dot(tl.trans(d_weights), queries, tl.dot(d_system, keys))
        dk = tl.dot(tl.trans(d_system), keys, dk)
        return tl.dot(d_weights, keys), dk, d_beta, tl.sum(faded, 1) - tl.sum(faded, 0)

    @triton.jit(do_not_specialize=["tokens", "chunks", "first", "columns", "per_row"])
    def _chunk_gradients_kernel(
        qkv,
        gates,
        written,
        states,
        grad_output,
        grad_rest,
        grad_states,
        grad_qkv,
        grad_gates,
        tokens,
        chunks,
        first,
        columns,
        per_row,
        H: tl.constexpr,
        KEY_HEADS: tl.constexpr,
        D: tl.constexpr,
        C: tl.constexpr,
        V_TILE: tl.constexpr,
    ):
        """All gradients of one chunk of one key head, with the states around it known."""
        chunk, key_head, sequence, _, _, begin = _place_of(chunks, KEY_HEADS, tokens, first, columns, per_row)
        row, key = tl.arange(0, C), tl.arange(0, D)
        begin, inside = begin + chunk * C, chunk * C + row < tokens
        channels: tl.constexpr = 2 * KEY_HEADS * D + H * D
        qkv, grad_qkv = qkv + begin * channels, grad_qkv + begin * channels
        of_queries = row[:, None] * channels + key_head * D + key[None, :]
        queries = tl.load(qkv + of_queries, mask=inside[:, None], other=0.0)
        keys = tl.load(qkv + of_queries + KEY_HEADS * D, mask=inside[:, None], other=0.0)
        dq, dk = tl.zeros((C, D), tl.float32), tl.zeros((C, D), tl.float32)
        for group in tl.static_range(H // KEY_HEADS):
            head = key_head * (H // KEY_HEADS) + group
            at = (begin + row) * 2 * H + head
            decay, total, b, fade = _decay_of(gates, at, inside, row, H)
            first_value, state = (begin * H + head) * D, ((sequence * chunks + chunk) * H + head) * D * D
            do, dr, s = grad_output + first_value, grad_rest + first_value, states + state
            # every product with e^G is its own derivative
            part, rest = _with_state(s, do, dr, inside, H, D, C, V_TILE)
            part, rest = part * (tl.exp(decay) * D**-0.5)[:, None], rest * tl.exp(decay)[:, None]
            dq, dk = dq + part, dk - b[:, None] * rest
            d_beta = -tl.sum(rest * keys.to(tl.float32), 1)
            d_decay = tl.sum(part * queries.to(tl.float32), 1) + b * d_beta
            part, kept, d_weights, d_system = _with_written(
                written + first_value, s, grad_states + state, do, dr, inside, H, D, C, V_TILE
            )
            part *= tl.exp(total - decay)[:, None]
            at_end, dk = tl.sum(part * keys.to(tl.float32), 1), dk + part
            d_beta += _of_values(qkv, grad_qkv, 2 * KEY_HEADS * D + head * D, dr, b, inside, channels, H, D, C)
            part, rest, of_beta, of_decay = _within(d_weights * D**-0.5, d_system, queries, keys, fade, b, row)
            dq, dk = dq + part, dk + rest
            d_g = tl.cumsum(d_decay + of_decay - at_end, 0, reverse=True)
            tl.store(grad_gates + at, d_g + tl.exp(total) * kept + tl.sum(at_end), mask=inside)
            tl.store(grad_gates + at + H, d_beta + of_beta, mask=inside)
        tl.store(grad_qkv + of_queries, dq.to(grad_qkv.dtype.element_ty), mask=inside[:, None])
        tl.store(grad_qkv + of_queries + KEY_HEADS * D, dk.to(grad_qkv.dtype.element_ty), mask=inside[:, None])


class Layout(NamedTuple):
    """Where the two streams of a pass stand.

    Fields:
        num_noisy: columns of the noisy stream, which come first.
        block_size: tokens per block, a multiple of `CHUNK`.
        blocks: [B or 1, M], the index of each noisy block.
        places: [B or 1, N] int32, for each block of the clean stream which of the noisy blocks it is, -1 for none.
    """

    num_noisy: int
    block_size: int
    blocks: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, num_noisy: int, block_size: int, blocks: torch.Tensor, columns: int) -> "Layout":
        """Of `Streams` fields and the number of columns of both streams."""
        num_blocks = -(-(columns - num_noisy) // block_size)
        places = torch.full((len(blocks), num_blocks), -1, dtype=torch.int32, device=blocks.device)
        numbers = torch.arange(blocks.shape[1], dtype=torch.int32, device=blocks.device)
        return cls(num_noisy, block_size, blocks, places.scatter_(1, blocks, numbers.expand_as(blocks)))

    def sequences(self, columns: int, *, noisy: bool) -> tuple[int, int, int, int, int]:
        """Tokens and chunks of a sequence of one stream, its first column, `columns`, and how many a row has."""
        tokens = self.block_size if noisy else columns - self.num_noisy
        first, per_row = (0, self.num_noisy // self.block_size) if noisy else (self.num_noisy, 1)
        return tokens, triton.cdiv(tokens, CHUNK), first, columns, per_row


class _TwoStreamDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: torch.Tensor, gates: torch.Tensor, layout: Layout, key_heads: int, dim: int) -> torch.Tensor:
        batch, columns, _, heads = gates.shape
        shape = {"H": heads, "KEY_HEADS": key_heads, "D": dim, "C": CHUNK}
        output, written = qkv.new_empty(2, batch, columns, heads, dim)
        boundaries, states = gates.new_empty(batch, layout.places.shape[1], heads, dim, dim), []
        for noisy in (False, True):
            sizes, tile = layout.sequences(columns, noisy=noisy), min(WALK_TILE, dim)
            sequences, chunks = batch * sizes[-1], sizes[1]
            # the backward pass alone reads them, and they are eight times what the layer puts out
            states.append(qkv.new_empty(sequences, chunks, heads, dim, dim) if any(ctx.needs_input_grad) else None)
            _forward_kernel[(dim // tile * sequences * heads,)](
                *(qkv, gates, layout.blocks if noisy else None, boundaries, output, written, states[-1]),
                *(*sizes, boundaries.shape[1], row_stride(layout.blocks)),
                **shape,
                V_TILE=tile,
                CHUNKS_PER_BLOCK=layout.block_size // CHUNK,
                num_warps=4,
            )
        ctx.save_for_backward(qkv, gates, written, *states, layout.blocks, layout.places)
        ctx.layout, ctx.shape = (layout.num_noisy, layout.block_size), shape
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple:
        qkv, gates, written, *states, blocks, places = ctx.saved_tensors
        layout, shape, (_, columns, _, heads) = Layout(*ctx.layout, blocks, places), ctx.shape, gates.shape
        grad_output, grad_rest, grad_boundaries = grad_output.contiguous(), torch.empty_like(written), None
        grad_qkv, grad_gates = torch.empty_like(qkv), torch.empty_like(gates)
        # noisy blocks first: what they want of the clean states is met on the way back through these
        for noisy in (True, False):
            own_states, tile = states[noisy], min(WALK_TILE, shape["D"])
            grad_states, sizes = torch.empty_like(own_states), layout.sequences(columns, noisy=noisy)
            grad_initial = torch.empty_like(own_states[:, 0], dtype=gates.dtype) if noisy else None
            _backward_kernel[(shape["D"] // tile * len(own_states) * heads,)](
                *(qkv, gates, *((None, None) if noisy else (places, grad_boundaries))),
                *(grad_output, grad_rest, grad_states, grad_initial),
                *(*sizes, layout.num_noisy // layout.block_size, row_stride(places)),
                **shape,
                V_TILE=tile,
                CHUNKS_PER_BLOCK=layout.block_size // CHUNK,
                num_warps=4,
            )
            _chunk_gradients_kernel[(own_states.shape[1] * len(own_states) * shape["KEY_HEADS"],)](
                *(qkv, gates, written, own_states, grad_output, grad_rest, grad_states, grad_qkv, grad_gates, *sizes),
                **shape,
                V_TILE=min(GRADIENT_TILE, shape["D"]),
                num_warps=4,
                num_stages=2,
            )
            grad_boundaries = grad_initial
        return grad_qkv, grad_gates, None, None, None


def two_stream_delta_rule(
    qkv: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, layout: Layout, *, key_heads: int, dim: int
) -> torch.Tensor:
    """The gated delta rule over both streams, noisy blocks from the clean states at their boundaries.

    Args:
        qkv: [B, columns, channels], queries and keys normalised to length 1.
        g: [B, columns, H] float32, log decay.
        beta: [B, columns, H] float32, write strength. A token with beta = g = 0 leaves the state as it is.
        layout: of the columns.
        key_heads: heads of the queries and keys.
        dim: size of keys and values, a power of 2 from 16 to 128.

    Returns:
        [B, columns, H, dim] in the dtype of qkv.
    """
    return _TwoStreamDeltaRule.apply(qkv.contiguous(), torch.stack((g, beta), 2), layout, key_heads, dim)
