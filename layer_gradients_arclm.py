"""Triton kernels with gradients of what stands between a layer's products: norms, gates, the convolution.

PyTorch reads and writes the hidden states at every operation; here a function reads its inputs once, computes in
float32 and writes its result, and its gradient computes again what was not kept. Gradients of weights are summed in
parts.
"""

import torch
from torch import nn

from .delta_gradients_arclm import Layout
from .delta_kernels_arclm import gated_norm as gated_norm_of_rows
from .kernels_arclm import row_stride, tl, triton
from .linear_kernels_arclm import rms_norm as rms_norm_of_rows
from .linear_kernels_arclm import silu_mul


PROGRAMS = 512  # that share the rows of a norm: as many parts has the gradient of its weight
CONVOLUTION_TILE = 32  # tokens


if triton is not None:

    @triton.jit
    def _gate_of(gate, at, inside):
        """SiLU of a gate, and its derivative."""
        z = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(z)
        return z * s, s * (1.0 + z * (1.0 - s))

    @triton.jit(do_not_specialize=["rows"])
    def _norm_gradients_kernel(
        x,
        weight,
        gate,
        grad_output,
        grad_x,
        grad_weight,
        grad_gate,
        rows,
        eps,
        D: tl.constexpr,
        D_TILE: tl.constexpr,
        R: tl.constexpr,
    ):
        """The gradients of RMSNorm, maybe gated, for every so many R rows, that of the weight summed over them."""
        program, column = tl.program_id(0), tl.arange(0, D_TILE)
        w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        if gate is None:
            w += 1.0
        d_weight = tl.zeros((D_TILE,), tl.float32)
        for start in range(program * R, rows, tl.num_programs(0) * R):
            row = start + tl.arange(0, R)
            inside = (row < rows)[:, None] & (column < D)[None, :]
            at = row.to(tl.int64)[:, None] * D + column[None, :]
            y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(y * y, 1) / D + eps)[:, None]
            y *= scale
            dy = tl.load(grad_output + at, mask=inside, other=0.0).to(tl.float32)
            if gate is not None:
                silu, slope = _gate_of(gate, at, inside)
                dz = dy * y * w[None, :] * slope
                tl.store(grad_gate + at, dz.to(grad_gate.dtype.element_ty), mask=inside)
                dy *= silu
            d_weight += tl.sum(dy * y, 0)
            dy *= w[None, :]
            dx = (dy - y * (tl.sum(dy * y, 1) / D)[:, None]) * scale
            tl.store(grad_x + at, dx.to(grad_x.dtype.element_ty), mask=inside)
        tl.store(grad_weight + program * D + column, d_weight, mask=column < D)

    @triton.jit
    def _swiglu_gradients_kernel(gate, up, grad_output, grad_gate, grad_up, size, TILE: tl.constexpr):
        """The gradients of SiLU(gate) * up, of TILE numbers."""
        at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        inside = at < size
        silu, slope = _gate_of(gate, at, inside)
        dy = tl.load(grad_output + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_gate + at, (dy * x * slope).to(grad_gate.dtype.element_ty), mask=inside)
        tl.store(grad_up + at, (dy * silu).to(grad_up.dtype.element_ty), mask=inside)

    @triton.jit
    def _source_of(column, back, blocks, num_noisy, columns, L: tl.constexpr):
        """The column of the token `back` before each column, and whether there is one.

        Before a noisy block stand the clean tokens before it.
        """
        is_noisy, offset = column < num_noisy, column % L - back
        block = tl.load(blocks + column // L, mask=is_noisy, other=0).to(tl.int32)
        in_clean = num_noisy + block * L + offset
        source = tl.where(is_noisy & (offset < 0), in_clean, column - back)
        return source, (column < columns) & ((is_noisy & (offset >= 0)) | (source >= num_noisy))

    @triton.jit
    def _convolved(mixed, weight, column, channel, blocks, num_noisy, columns, channels, L, TAPS: tl.constexpr):
        """The sum over the taps [tokens, D]."""
        total = tl.zeros((column.shape[0], channel.shape[0]), tl.float32)
        for tap in tl.static_range(TAPS):
            source, there = _source_of(column, TAPS - 1 - tap, blocks, num_noisy, columns, L)
            at = source.to(tl.int64)[:, None] * channels + channel[None, :]
            x = tl.load(mixed + at, mask=there[:, None], other=0.0).to(tl.float32)
            total += x * tl.load(weight + channel * TAPS + tap).to(tl.float32)[None, :]
        return total

    @triton.jit(do_not_specialize=["num_noisy", "columns", "blocks_row"])
    def _convolution_kernel(
        mixed,
        weight,
        blocks,
        output,
        num_noisy,
        columns,
        blocks_row,
        channels,
        num_keys,
        L: tl.constexpr,
        D: tl.constexpr,
        TAPS: tl.constexpr,
        T_TILE: tl.constexpr,
    ):
        """D channels, a head, at T_TILE columns of one row; see `two_stream_convolution`."""
        head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        column, channel = tl.program_id(0) * T_TILE + tl.arange(0, T_TILE), head * D + tl.arange(0, D)
        first = batch * columns * channels
        mixed, output, blocks = mixed + first, output + first, blocks + batch * blocks_row
        y = _convolved(mixed, weight, column, channel, blocks, num_noisy, columns, channels, L, TAPS)
        y *= tl.sigmoid(y)
        if head < num_keys:  # queries and keys
            y *= tl.rsqrt(tl.sum(y * y, 1) + 1e-6)[:, None]
        at = column.to(tl.int64)[:, None] * channels + channel[None, :]
        tl.store(output + at, y.to(output.dtype.element_ty), mask=(column < columns)[:, None])

    @triton.jit(do_not_specialize=["num_noisy", "columns", "blocks_row"])
    def _convolution_sums_kernel(
        mixed,
        weight,
        blocks,
        grad_output,
        grad_total,
        grad_weight,
        num_noisy,
        columns,
        blocks_row,
        channels,
        num_keys,
        L: tl.constexpr,
        D: tl.constexpr,
        TAPS: tl.constexpr,
        T_TILE: tl.constexpr,
    ):
        """The gradients of the sums over the taps, and of the weights a part for each T_TILE columns."""
        head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        column, channel = tl.program_id(0) * T_TILE + tl.arange(0, T_TILE), head * D + tl.arange(0, D)
        first = batch * columns * channels
        mixed, blocks = mixed + first, blocks + batch * blocks_row
        total = _convolved(mixed, weight, column, channel, blocks, num_noisy, columns, channels, L, TAPS)
        at = first + column.to(tl.int64)[:, None] * channels + channel[None, :]
        inside = (column < columns)[:, None]
        dy = tl.load(grad_output + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(total)
        y = total * s
        if head < num_keys:
            scale = tl.rsqrt(tl.sum(y * y, 1) + 1e-6)[:, None]
            y *= scale
            dy = (dy - y * tl.sum(dy * y, 1)[:, None]) * scale
        dy *= s * (1.0 + total * (1.0 - s))
        tl.store(grad_total + at, dy.to(grad_total.dtype.element_ty), mask=inside)
        part = (batch * tl.num_programs(0) + tl.program_id(0)) * channels
        for tap in tl.static_range(TAPS):
            source, there = _source_of(column, TAPS - 1 - tap, blocks, num_noisy, columns, L)
            of_source = source.to(tl.int64)[:, None] * channels + channel[None, :]
            x = tl.load(mixed + of_source, mask=there[:, None], other=0.0).to(tl.float32)
            tl.store(grad_weight + (part + channel) * TAPS + tap, tl.sum(dy * x, 0))

    @triton.jit(do_not_specialize=["num_noisy", "columns", "places_row"])
    def _convolution_inputs_kernel(
        weight,
        places,
        grad_total,
        grad_mixed,
        num_noisy,
        columns,
        places_row,
        channels,
        L: tl.constexpr,
        D: tl.constexpr,
        TAPS: tl.constexpr,
        T_TILE: tl.constexpr,
    ):
        """Collect from the columns that have read each column; a clean token is read from both streams."""
        head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        column, channel = tl.program_id(0) * T_TILE + tl.arange(0, T_TILE), head * D + tl.arange(0, D)
        grad_total, grad_mixed = grad_total + batch * columns * channels, grad_mixed + batch * columns * channels
        is_noisy, token, inside = column < num_noisy, column - num_noisy, column < columns
        dx = tl.zeros((T_TILE, D), tl.float32)
        for ahead in tl.static_range(TAPS):
            w = tl.load(weight + channel * TAPS + TAPS - 1 - ahead).to(tl.float32)[None, :]
            reader = column + ahead
            there = tl.where(is_noisy, column % L + ahead < L, reader < columns)
            at = reader.to(tl.int64)[:, None] * channels + channel[None, :]
            dx += w * tl.load(grad_total + at, mask=there[:, None], other=0.0).to(tl.float32)
            if ahead > 0:
                offset, block = (token + ahead) % L, (token + ahead) // L
                # the block begins between this token and its reader, and the row has it
                there = inside & ~is_noisy & (offset < ahead) & (block * L < columns - num_noisy)
                place = tl.load(places + batch * places_row + block, mask=there, other=-1)
                at = (place * L + offset).to(tl.int64)[:, None] * channels + channel[None, :]
                dx += w * tl.load(grad_total + at, mask=(there & (place >= 0))[:, None], other=0.0).to(tl.float32)
        at = column.to(tl.int64)[:, None] * channels + channel[None, :]
        tl.store(grad_mixed + at, dx.to(grad_mixed.dtype.element_ty), mask=inside[:, None])


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gate, norm: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        x, gate, ctx.eps = x.contiguous(), gate if gate is None else gate.contiguous(), norm.eps
        ctx.save_for_backward(x, weight, gate)
        if gate is None:
            return rms_norm_of_rows(x.flatten(0, -2), norm, dtype).view(x.shape)
        return gated_norm_of_rows(x.flatten(0, -3), gate.flatten(-2).flatten(0, -2), norm).view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple:
        x, weight, gate = ctx.saved_tensors
        grad_x, grad_gate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
        dim = x.shape[-1]
        rows, tile = x.numel() // dim, triton.next_power_of_2(dim)
        at_once = max(1, 1024 // tile)
        programs = min(PROGRAMS, triton.cdiv(rows, at_once))
        parts = torch.empty(programs, dim, dtype=torch.float32, device=x.device)
        _norm_gradients_kernel[(programs,)](
            *(x, weight, gate, grad_output.contiguous(), grad_x, parts, grad_gate, rows, ctx.eps),
            D=dim,
            D_TILE=tile,
            R=at_once,
            num_warps=4,
        )
        return grad_x, parts.sum(0).to(weight.dtype), grad_gate, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return silu_mul(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple:
        gate, up = ctx.saved_tensors
        grads = torch.empty_like(gate), torch.empty_like(up)
        _swiglu_gradients_kernel[(triton.cdiv(gate.numel(), 1024),)](
            gate, up, grad_output.contiguous(), *grads, gate.numel(), TILE=1024, num_warps=4
        )
        return grads


class _TwoStreamConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, weight, layout: Layout, head_dim: int, num_keys: int) -> torch.Tensor:
        mixed = mixed.contiguous()
        output, (batch, columns, channels) = torch.empty_like(mixed), mixed.shape
        ctx.grid = triton.cdiv(columns, CONVOLUTION_TILE), channels // head_dim, batch
        ctx.tiles = {"L": layout.block_size, "D": head_dim, "TAPS": weight.shape[-1], "T_TILE": CONVOLUTION_TILE}
        ctx.num_keys, ctx.num_noisy = num_keys, layout.num_noisy
        _convolution_kernel[ctx.grid](
            *(mixed, weight, layout.blocks, output),
            *(layout.num_noisy, columns, row_stride(layout.blocks), channels, num_keys),
            **ctx.tiles,
            num_warps=4,
        )
        ctx.save_for_backward(mixed, weight, layout.blocks, layout.places)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple:
        mixed, weight, blocks, places = ctx.saved_tensors
        channels, sizes = mixed.shape[2], (ctx.num_noisy, mixed.shape[1])
        grad_total, grad_mixed = torch.empty_like(mixed), torch.empty_like(mixed)
        parts = torch.empty(ctx.grid[2] * ctx.grid[0], *weight.shape, dtype=torch.float32, device=mixed.device)
        _convolution_sums_kernel[ctx.grid](
            *(mixed, weight, blocks, grad_output.contiguous(), grad_total, parts),
            *(*sizes, row_stride(blocks), channels, ctx.num_keys),
            **ctx.tiles,
            num_warps=8,
        )
        _convolution_inputs_kernel[ctx.grid](
            *(weight, places, grad_total, grad_mixed, *sizes, row_stride(places), channels), **ctx.tiles, num_warps=4
        )
        return grad_mixed, parts.sum(0).to(weight.dtype), None, None, None


def rms_norm(x: torch.Tensor, norm: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """`Qwen3_5RMSNorm` of x [..., D], in `dtype`."""
    return _Norm.apply(x, norm.weight, None, norm, dtype)


def gated_norm(x: torch.Tensor, gate: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """`ArcLMRMSNormGated` of x and its gate, both [..., Vd]."""
    return _Norm.apply(x, norm.weight, gate, norm, x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * up, of one shape."""
    return _SwiGLU.apply(gate, up)


def two_stream_convolution(
    mixed: torch.Tensor, weight: torch.Tensor, layout: Layout, *, head_dim: int, num_keys: int
) -> torch.Tensor:
    """`ArcLMConv1d` over both streams, noisy blocks after the clean tokens before them.

    Heads below `num_keys`, the queries and keys, are normalised to length 1.

    Args:
        mixed: [B, columns, channels].
        weight: [channels, 1, taps].
        layout: of the columns.
        head_dim: channels of a head, a power of 2.
        num_keys: how many heads are queries and keys.

    Returns:
        [B, columns, channels].
    """
    return _TwoStreamConvolution.apply(mixed, weight, layout, head_dim, num_keys)
