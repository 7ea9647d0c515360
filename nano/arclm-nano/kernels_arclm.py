"""Faster ways through two computations on a GPU, each with the results of the PyTorch code it stands in for.

- `affine_scan`, a Triton kernel: the states from chunk to chunk in `gated_delta_rule.py`, and their gradient.
- `sample_rows`, two Triton kernels: the proposals of a denoising step in `denoising_bd3lm.py`, from one reading of the
  logits.

Whole layers are in `fused_arclm.py`. `usable` decides: on a GPU of compute capability 8.0 or more, after a small
problem was computed right on that very device. Otherwise it says once why not, and PyTorch does the work.
"""

from collections.abc import Callable
from functools import cache

import torch
from transformers.utils import logging


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

logger = logging.get_logger(__name__)

MIN_CAPABILITY = (8, 0)
MAX_SCAN_DIM = 128  # a transition [K, K] stays in shared memory, of which an RTX 4090 gives 101,376 bytes to a program
VOCABULARY_TILE = 4096


if triton is not None:

    @triton.jit(do_not_specialize=["N"])  # one compilation for all lengths
    def _affine_scan_kernel(
        transition,
        update,
        initial_state,
        states,
        N,
        H,
        K: tl.constexpr,
        V: tl.constexpr,
        K_TILE: tl.constexpr,
        V_TILE: tl.constexpr,
        REVERSE: tl.constexpr,
    ):
        """Scan V_TILE columns of the states of one head of one row; see `affine_scan`."""
        head = tl.program_id(1).to(tl.int64)  # of B * H; int64, as a long row has more than 2**31 numbers
        batch, head = head // H, head % H
        row = tl.arange(0, K_TILE)
        column = tl.program_id(0) * V_TILE + tl.arange(0, V_TILE)
        is_key = row < K
        of_state, in_state = row[:, None] * V + column[None, :], is_key[:, None] & (column < V)[None, :]
        # the reverse scan reads the transition transposed
        of_transition = row[:, None] + row[None, :] * K if REVERSE else row[:, None] * K + row[None, :]
        in_transition = is_key[:, None] & is_key[None, :]

        first = N if REVERSE else 0
        state = tl.load(initial_state + (batch * H + head) * K * V + of_state, mask=in_state, other=0.0)
        tl.store(states + ((batch * (N + 1) + first) * H + head) * K * V + of_state, state, mask=in_state)
        for step in range(N):
            n = N - 1 - step if REVERSE else step
            chunk = (batch * N + n) * H + head
            p = tl.load(transition + chunk * K * K + of_transition, mask=in_transition, other=0.0)
            e = tl.load(update + chunk * K * V + of_state, mask=in_state, other=0.0)
            # three TF32 products: the accuracy of float32, while "ieee" spills 2 to 10 KB of registers per thread
            state = tl.dot(p, state, e, input_precision="tf32x3")
            after = n if REVERSE else n + 1
            tl.store(states + ((batch * (N + 1) + after) * H + head) * K * V + of_state, state, mask=in_state)

    @triton.jit
    def _read_tiles_kernel(
        logits,
        places,
        is_suppressed,
        seed,
        statistics,
        candidates,
        row_stride,
        vocabulary,
        mask_token_id,
        temperature,
        SAMPLE: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """Reduce one tile of one row of the logits to four numbers and a candidate; see `sample_rows`."""
        row, tile, num_tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        place = tl.load(places + row).to(tl.int32)
        if place == 0:
            return
        column = tile * TILE + tl.arange(0, TILE)
        inside = column < vocabulary
        x = tl.load(logits + row.to(tl.int64) * row_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside & (column != mask_token_id), x, float("-inf"))
        num_broken = tl.sum((~(x < float("inf"))).to(tl.int32))  # NaN or infinite
        # the bounds keep logits of -inf, and those at the end of the range, from making inf - inf
        highest = tl.maximum(tl.max(x), -3.4028234663852886e38)
        shift = tl.maximum(x - highest, -200.0)
        weight = tl.exp(shift)
        total = tl.where(num_broken > 0, float("nan"), tl.sum(weight))

        score = tl.where(tl.load(is_suppressed + column, mask=inside, other=True), float("-inf"), x)
        if SAMPLE:
            bits, _, _, _ = tl.philox(tl.load(seed), column, place, 0, 0)
            u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)  # in (0, 1)
            # -log(1 - u), exponentially distributed; the winners have small u, where 1 - u would round
            wait = tl.where(u < 0.00390625, u + 0.5 * u * u, -tl.log(1.0 - u))
            score = score / temperature - tl.log(wait)
        score = tl.where(score == score, score, float("-inf"))  # NaN is not proposed
        best, index = tl.max(score, 0, return_indices=True)  # of equal ones the first

        cell, size = row * num_tiles + tile, tl.num_programs(0) * num_tiles
        tl.store(statistics + cell, highest)
        tl.store(statistics + size + cell, total)
        tl.store(statistics + 2 * size + cell, tl.sum(shift * weight))
        tl.store(statistics + 3 * size + cell, best)
        tl.store(candidates + cell, tile * TILE + index)

    @triton.jit
    def _join_tiles_kernel(
        logits,
        places,
        statistics,
        candidates,
        tokens,
        confidence,
        entropy,
        is_finite,
        row_stride,
        vocabulary,
        mask_token_id,
        num_tiles,
        TILES: tl.constexpr,
    ):
        """Results of one row from what its tiles have left; see `sample_rows`."""
        row = tl.program_id(0)
        if tl.load(places + row) == 0:
            tl.store(tokens + row, mask_token_id)
            tl.store(confidence + row, -1.0)
            tl.store(entropy + row, float("inf"))
            tl.store(is_finite + row, 1)
            return
        tile = tl.arange(0, TILES)
        inside, size = tile < num_tiles, tl.num_programs(0) * num_tiles
        cell = statistics + row * num_tiles + tile
        highest = tl.load(cell, mask=inside, other=float("-inf"))
        total = tl.load(cell + size, mask=inside, other=0.0)
        weighted = tl.load(cell + 2 * size, mask=inside, other=0.0)  # the sum of (x - highest) e^{x - highest}
        best = tl.load(cell + 3 * size, mask=inside, other=float("-inf"))
        # where all is -inf, any token of the vocabulary does
        winner = tl.minimum(tl.argmax(best, 0), num_tiles - 1)
        token = tl.minimum(tl.load(candidates + row * num_tiles + winner), vocabulary - 1)

        top = tl.max(highest)
        shift = tl.maximum(highest - top, -200.0)
        weighted = tl.sum((weighted + shift * total) * tl.exp(shift))
        total = tl.sum(total * tl.exp(shift))
        logit = tl.load(logits + row.to(tl.int64) * row_stride + token).to(tl.float32)
        tl.store(tokens + row, token.to(tl.int64))
        tl.store(confidence + row, tl.exp(logit - top) / total)
        tl.store(entropy + row, tl.log(total) - weighted / total)
        tl.store(is_finite + row, (total > 0) & (total < float("inf")))


def affine_scan(
    transition: torch.Tensor, update: torch.Tensor, initial_state: torch.Tensor, *, reverse: bool = False
) -> torch.Tensor:
    """Compute S_{n+1} = P_n S_n + E_n from S_0, or S_n = P_n^T S_{n+1} + E_n from S_N, which is the scan's gradient.

    Args:
        transition: P, [B, N, H, K, K] float32, K <= 128.
        update: E, [B, N, H, K, Vd] float32.
        initial_state: S_0, or S_N in reverse, [B, H, K, Vd] float32.
        reverse: which of the two.

    Returns:
        S_0 .. S_N, [B, N + 1, H, K, Vd], in this order in reverse too.
    """
    batch, chunks, heads, key_dim, value_dim = update.shape
    states = update.new_empty(batch, chunks + 1, heads, key_dim, value_dim)
    value_tile = 16
    with torch.cuda.device_of(update):
        _affine_scan_kernel[(triton.cdiv(value_dim, value_tile), batch * heads)](
            transition.contiguous(),
            update.contiguous(),
            initial_state.contiguous(),
            states,
            chunks,
            heads,
            K=key_dim,
            V=value_dim,
            K_TILE=max(16, triton.next_power_of_2(key_dim)),
            V_TILE=value_tile,
            REVERSE=reverse,
            num_warps=8,
            num_stages=2,
        )
    return states


def sample_rows(
    logits: torch.Tensor,
    is_suppressed: torch.Tensor,
    mask_token_id: int,
    *,
    temperature: float | None = None,
    seed: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Propose a token for every row from one reading of its logits, in float32.

    A sample is the argmax of logits / temperature plus Gumbel noise, -log of an exponential variable: distributed as
    softmax(logits / temperature).

    Args:
        logits: [R, V] bfloat16, float16 or float32, the last dimension contiguous.
        is_suppressed: [V] bool, tokens that are not proposed; True for the mask token.
        mask_token_id: has no probability.
        temperature: > 0, or `None` for the most probable token, of equal ones the first.
        seed: [1] int64 on the device of `logits`, needed with a temperature.
        places: [R] int64, from 1 on, the row's number if `None`. The same seed gives the same logits at the same place
            the same token, whatever the other rows. A row whose place is 0 is not read.

    Returns:
        tokens [R] int64; confidence [R] float32, the probability of each under softmax(logits); entropy [R] float32 of
        softmax(logits) in nats; is_finite [R] bool, False for a row without probabilities, as a logit of NaN or +inf
        leaves it: its other results mean nothing. A row that is not read has the mask token, -1,
        infinity and True.
    """
    rows, vocabulary = logits.shape
    num_tiles, device = triton.cdiv(vocabulary, VOCABULARY_TILE), logits.device
    statistics = torch.empty(4, rows, num_tiles, dtype=torch.float32, device=device)
    candidates = torch.empty(rows, num_tiles, dtype=torch.int32, device=device)
    types = torch.long, torch.float32, torch.float32, torch.bool
    results = tuple(torch.empty(rows, dtype=dtype, device=device) for dtype in types)
    places = torch.arange(1, rows + 1, device=device) if places is None else places
    tiles, sizes = (statistics, candidates), (logits.stride(0), vocabulary, mask_token_id)
    with torch.cuda.device_of(logits):
        _read_tiles_kernel[(rows, num_tiles)](
            logits,
            places,
            is_suppressed.contiguous(),
            places if seed is None else seed,  # without sampling any pointer does: it is not read
            *tiles,
            *sizes,
            1.0 if temperature is None else float(temperature),
            SAMPLE=temperature is not None,
            TILE=VOCABULARY_TILE,
            num_warps=8,
        )
        padded = triton.next_power_of_2(num_tiles)
        _join_tiles_kernel[(rows,)](logits, places, *tiles, *results, *sizes, num_tiles, TILES=padded, num_warps=1)
    return results


def use_affine_scan(update: torch.Tensor) -> bool:
    """Whether `affine_scan` takes an update [B, N, H, K, Vd]."""
    key_dim, value_dim = update.shape[-2:]
    fits = update.dtype == torch.float32 and key_dim <= MAX_SCAN_DIM
    return fits and usable("affine_scan", update.device, key_dim, value_dim)


def use_sample_rows(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `sample_rows` takes logits of that type there."""
    return dtype != torch.float64 and usable("sample_rows", device)


@cache
def usable(kernel: str, device: torch.device, *problem) -> bool:
    """Decide, once per process, whether a kernel runs on this device; warn where a GPU could have been faster.

    Args:
        kernel: a key of `CHECKS`.
        device: of the tensors.
        problem: what the kernel is compiled for, handed to its self-check.
    """
    if device.type != "cuda":
        return False
    try:
        obstacle = _obstacle(kernel, device, problem)
    except Exception as error:  # compilers, drivers and other people's packages raise what they like
        obstacle = f"its self-check raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if obstacle is None:
        logger.info(f"{kernel} is used on {device}: its self-check passed.")
    else:
        logger.warning_once(f"{kernel} is not used on {device}: {obstacle}. PyTorch gives the same results, slower.")
    return obstacle is None


def _obstacle(kernel: str, device: torch.device, problem: tuple) -> str | None:
    """Say why the kernel cannot be used, `None` if it can."""
    if triton is None:
        return "Triton is not installed (pip install triton)"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return "its compute capability is {}.{}, and {}.{} is the least".format(*capability, *MIN_CAPABILITY)
    check, bound = CHECKS[kernel]
    # a pass that asks may be checkpointed, which counts what is saved for gradients: what a check saves is none of it
    own = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), torch.no_grad(), own:  # an evaluation may ask, and a check have gradients
        error = check(device, *problem)
    return None if error <= bound else f"its self-check is off by {error:.1e}, and {bound:.0e} is allowed"


def row_stride(x: torch.Tensor) -> int:
    """How far apart the rows of x [B or 1, ...] are, 0 for the same one."""
    return 0 if len(x) == 1 else x.stride(0)


def normal_numbers(device: torch.device) -> Callable:
    """Draw from a generator of their own: a check must not move the caller's random numbers."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def relative_error(results: tuple, expected: tuple) -> float:
    """The largest difference, relative to the largest number; NaN if anything is."""
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(results, expected, strict=True)]
    return float(torch.stack(errors).double().max())


def _check_affine_scan(device: torch.device, key_dim: int, value_dim: int) -> float:
    """Scan both ways, against a loop in float64."""
    normal = normal_numbers(device)
    transition = normal(2, 5, 3, key_dim, key_dim) * 0.5 * key_dim**-0.5
    update, state = (normal(*shape, 3, key_dim, value_dim) for shape in ((2, 5), (2,)))
    forward, backward = [state.double()], [state.double()]
    for n in range(5):
        forward.append(transition[:, n].double() @ forward[-1] + update[:, n])
        backward.append(transition[:, 4 - n].double().mT @ backward[-1] + update[:, 4 - n])
    results = affine_scan(transition, update, state), affine_scan(transition, update, state, reverse=True)
    return relative_error(results, (torch.stack(forward, 1), torch.stack(backward[::-1], 1)))


def _check_sample_rows(device: torch.device) -> float:
    """Greedy results of a few rows, and the frequencies of many samples."""
    normal = normal_numbers(device)
    logits = normal(3, 2 * VOCABULARY_TILE + 5) * 4
    logits[1, 5::9] = 20.0  # equal ones, of which the first counts, within a tile and between tiles
    mask_token_id = int(logits[0].argmax())
    is_suppressed = torch.arange(logits.shape[1], device=device) == mask_token_id
    tokens, confidence, entropy, is_finite = sample_rows(logits, is_suppressed, mask_token_id)
    probs = logits.double().masked_fill(is_suppressed, -torch.inf).softmax(-1)
    expected = probs.argmax(-1)
    exact = relative_error((confidence, entropy), (probs.amax(-1), torch.special.entr(probs).sum(-1)))

    logits = normal(7).expand(300, 7)
    seed = torch.tensor([1], device=device)
    drawn, *_ = sample_rows(logits, is_suppressed[:7], mask_token_id, temperature=0.7, seed=seed)
    # the standard deviation of a frequency is below 0.03
    unlucky = (drawn.bincount(minlength=7) / len(drawn) - (logits[0] / 0.7).softmax(-1)).abs().max()
    is_right = is_finite.all() and torch.equal(tokens, expected) and unlucky < 0.1
    return exact if is_right else float("nan")


# Each kernel's self-check and the relative error it is allowed. Other files of kernels add their own.
CHECKS = {
    "affine_scan": (_check_affine_scan, 1e-4),
    "sample_rows": (_check_sample_rows, 1e-4),
}
