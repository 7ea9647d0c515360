"""Triton kernels of the products of few rows with what stands around them, and of the norms and gates of many.

A product of a block's 64 rows waits for its weights: several weights in one launch keep more of them on the way.
"""

from typing import NamedTuple

import torch
from torch import nn

from .kernels_arclm import tl, triton


if triton is not None:

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
    def _silu_mul_kernel(gate, up, output, size, TILE: tl.constexpr):
        """SiLU(gate) * up of TILE numbers."""
        at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        x = tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32)
        x *= tl.sigmoid(x) * tl.load(up + at, mask=at < size, other=0.0).to(tl.float32)
        tl.store(output + at, x.to(output.dtype.element_ty), mask=at < size)

    @triton.jit
    def _weight_of(
        tile,
        w0,
        w1,
        w2,
        w3,
        N0: tl.constexpr,
        N1: tl.constexpr,
        N2: tl.constexpr,
        N3: tl.constexpr,
        N_TILE: tl.constexpr,
    ):
        """The weight that a tile is of, its first row in the tile, how many it has, and where its results begin."""
        T0: tl.constexpr = (N0 + N_TILE - 1) // N_TILE
        T1: tl.constexpr = T0 + (N1 + N_TILE - 1) // N_TILE
        T2: tl.constexpr = T1 + (N2 + N_TILE - 1) // N_TILE
        w, first, size, at = w0, tile * N_TILE, N0, 0
        if tile >= T0:
            w, first, size, at = w1, (tile - T0) * N_TILE, N1, N0
        if tile >= T1:
            w, first, size, at = w2, (tile - T1) * N_TILE, N2, N0 + N1
        if tile >= T2:
            w, first, size, at = w3, (tile - T2) * N_TILE, N3, N0 + N1 + N2
        return w, first, size, at

    @triton.jit(do_not_specialize=["rows", "parts"])
    def _linear_kernel(
        x,
        squares,
        w0,
        w1,
        w2,
        w3,
        residual,
        next_norm,
        output,
        next_x,
        next_squares,
        rows,
        parts,
        eps,
        N0: tl.constexpr,
        N1: tl.constexpr,
        N2: tl.constexpr,
        N3: tl.constexpr,
        D: tl.constexpr,
        GATED: tl.constexpr,
        M_TILE: tl.constexpr,
        N_TILE: tl.constexpr,
        D_TILE: tl.constexpr,
    ):
        """N_TILE columns of up to four products of all rows; see `linear`."""
        tile = tl.program_id(0)
        w, first, size, at = w0, tile * N_TILE, N0, 0
        if not GATED:
            w, first, size, at = _weight_of(tile, w0, w1, w2, w3, N0, N1, N2, N3, N_TILE)
        row, column, inner = tl.arange(0, M_TILE), first + tl.arange(0, N_TILE), tl.arange(0, D_TILE)
        in_x, in_w = (row < rows)[:, None], (column < size)[:, None]
        x_at, w_at = row[:, None] * D + inner[None, :], column[:, None] * D + inner[None, :]
        total = tl.zeros((M_TILE, N_TILE), tl.float32)
        total_up = tl.zeros((M_TILE, N_TILE), tl.float32)
        for start in range(0, D, D_TILE):
            y = tl.load(x + x_at + start, mask=in_x, other=0.0)
            total = tl.dot(y, tl.trans(tl.load(w + w_at + start, mask=in_w, other=0.0)), total)
            if GATED:
                total_up = tl.dot(y, tl.trans(tl.load(w1 + w_at + start, mask=in_w, other=0.0)), total_up)
        if squares is not None:  # (x / |x|) W = (x W) / |x|
            square = tl.zeros((M_TILE,), tl.float32)
            for part in range(parts):
                square += tl.load(squares + part * rows + row, mask=row < rows, other=0.0)
            total *= tl.rsqrt(square / D + eps)[:, None]
            total_up *= tl.rsqrt(square / D + eps)[:, None]
        if GATED:
            total *= tl.sigmoid(total) * total_up
        out_row: tl.constexpr = N0 if GATED else N0 + N1 + N2 + N3
        out_at = row[:, None] * out_row + at + column[None, :]
        inside = in_x & (column < size)[None, :]
        if residual is not None:
            total += tl.load(residual + out_at, mask=inside, other=0.0).to(tl.float32)
        result = total.to(output.dtype.element_ty)
        tl.store(output + out_at, result, mask=inside)
        if next_norm is not None:
            result = tl.where(inside, result.to(tl.float32), 0.0)
            weight = 1.0 + tl.load(next_norm + column, mask=column < size, other=0.0).to(tl.float32)
            tl.store(next_x + out_at, (result * weight[None, :]).to(output.dtype.element_ty), mask=inside)
            tl.store(next_squares + tile * rows + row, tl.sum(result * result, 1), mask=row < rows)


class Scaled(NamedTuple):
    """Rows on their way through an RMSNorm: multiplied by its weight, and not yet divided by their length.

    Fields:
        x: [rows, D].
        squares: [parts, rows] float32, whose sums are the squared lengths before the weight.
        eps: of the norm.
    """

    x: torch.Tensor
    squares: torch.Tensor
    eps: float


def linear(
    x: torch.Tensor | Scaled,
    layers: list[nn.Linear],
    *,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    next_norm: nn.Module | None = None,
) -> torch.Tensor | tuple[torch.Tensor, Scaled]:
    """The products of the rows of x with up to four weights side by side, in one launch.

    Args:
        x: [rows, D] contiguous, at most 64 rows.
        layers: without bias.
        gated: whether to multiply SiLU of the first product by the second.
        residual: [rows, N], is added.
        next_norm: an RMSNorm that the result goes through next.

    Returns:
        [rows, N] in the dtype of x, N all columns, or with `gated` those of one weight; with `next_norm` also as
        `Scaled`, for the product behind that norm.
    """
    x, squares, eps = (x, None, 0.0) if isinstance(x, torch.Tensor) else x
    (rows, dim), weights = x.shape, [layer.weight for layer in layers]
    sizes = [len(weight) for weight in weights] + [0] * (4 - len(weights))
    columns = sizes[0] if gated else sum(sizes)
    output, scaled = x.new_empty(rows, columns), None
    tile = next((tile for tile in (64, 32) if columns // tile >= 80), 16)
    tiles = sum(triton.cdiv(size, tile) for size in sizes[: 1 if gated else 4])
    if next_norm is not None:
        parts = torch.empty(tiles, rows, dtype=torch.float32, device=x.device)
        scaled = Scaled(torch.empty_like(output), parts, next_norm.eps)
    wide = 128 if tile == 16 else 64  # longer pieces of fewer columns
    _linear_kernel[(tiles,)](
        x,
        squares,
        *weights,
        *[weights[0]] * (4 - len(weights)),
        residual,
        None if scaled is None else next_norm.weight,
        output,
        None if scaled is None else scaled.x,
        None if scaled is None else scaled.squares,
        rows,
        0 if squares is None else len(squares),
        eps,
        *sizes,
        D=dim,
        GATED=gated,
        M_TILE=max(16, triton.next_power_of_2(rows)),
        N_TILE=tile,
        D_TILE=next(tile for tile in (wide, 64, 32, 16) if dim % tile == 0),
        num_warps=4,
        num_stages=4,
    )
    return output if scaled is None else (output, scaled)


def rms_norm(x: torch.Tensor, norm: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`Qwen3_5RMSNorm` of the rows of x [rows, D], in `dtype`, that of x if `None`."""
    dim, output = x.shape[1], torch.empty_like(x, dtype=dtype)
    tile = triton.next_power_of_2(dim)
    _norm_kernel[(len(x),)](
        x, norm.weight, output, norm.eps, D=dim, D_TILE=tile, num_warps=max(1, min(8, tile // 256))
    )
    return output


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * up, all contiguous and of one shape."""
    output = torch.empty_like(gate)
    _silu_mul_kernel[(triton.cdiv(gate.numel(), 1024),)](gate, up, output, gate.numel(), TILE=1024, num_warps=4)
    return output
