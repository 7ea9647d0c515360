"""The noise of block diffusion (BD3LM): which tokens of a batch are masked, and what each counts in the loss.

`make_loss_inputs` is what training calls. The file reads in this order: random numbers, schedules, masks.
"""

import math

import numpy as np
import torch
from torch import LongTensor, Tensor
from transformers import PretrainedConfig as Config

from arclm.data_bd3lm import IGNORE


T_MIN = 1e-3  # the lowest masking rate, as in MDLM; the share of the NELBO from rates below it is left out
GOLDEN_RATIO = (5**0.5 - 1) / 2
# the best of those that BD3-LM (arXiv:2503.09573, table 8) tried for blocks of 16
CLIPPED_RATES = (0.3, 0.8)


# ---- Random numbers


def draw_uniforms(key: tuple[int, int], rows: list[int], num_blocks: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Draw the random numbers of a batch; those of a row depend on nothing but `key` and the number of the row.

    So neither the other rows, padding, the number of processes nor a resume changes what is masked.

    Args:
        key: seed of the run and optimizer step, both >= 0.
        rows: B numbers >= 0, each unique within the step.
        num_blocks: N, blocks of a row.
        block_size: L, tokens of a block.

    Returns:
        offset [B] in [0, 1), low-discrepancy over consecutive rows, and uniforms [B, N, 1 + L] in [0, 1): for each
        block one number that ranks it, then one for each of its tokens.
    """
    start = np.random.default_rng(key).random()
    offset = torch.tensor([(start + row * GOLDEN_RATIO) % 1.0 for row in rows])
    # row + 1: a key that ends in 0 is the same key without it
    generators = [np.random.default_rng((*key, row + 1)) for row in rows]
    uniforms = np.stack([g.random((num_blocks, 1 + block_size), dtype=np.float32) for g in generators])
    return offset, torch.from_numpy(uniforms)


def sample_t(offset: Tensor, uniforms: Tensor, has_response: Tensor) -> Tensor:
    """Draw the time of every block, each by itself uniform, together stratified.

    The K blocks of a row that hold response tokens get one time in each of K equal parts of (T_MIN, 1], in random
    order. The place inside the part is the row's offset, so rows of a single block are stratified as well.

    Args:
        offset: [B] in [0, 1).
        uniforms: [B, N] in [0, 1), ranks the blocks of a row.
        has_response: [B, N] bool, True where the block has a token that can be masked.

    Returns:
        t: [B, N] times in [T_MIN, 1]; 1 for a block without response.
    """
    rank = uniforms.masked_fill(~has_response, torch.inf).argsort(-1).argsort(-1)  # [B, N], 0 to K - 1 with response
    num_parts = has_response.sum(-1, keepdim=True).clamp(min=1)
    t = 1 - (1 - T_MIN) * (rank + offset[:, None]) / num_parts
    return t.masked_fill(~has_response, 1.0)


# ---- Schedules


def linear(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha(t) = 1 - t: the masking rate is t itself."""
    return t, 1 / t


def cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha(t) = cos(pi t / 2), from rate T_MIN on: light masking, as in the code of MDLM and BD3-LM.

    (Under the same name dLLM and MD4, arXiv:2406.04329, have its mirror image, which masks much: 1 - sin(pi t / 2).)
    """
    slope = (math.pi / 2 - math.acos(1 - T_MIN)) / (1 - T_MIN)
    angle = math.pi / 2 - slope * (1 - t)
    rate = 2 * (angle / 2).sin() ** 2  # 1 - cos(angle), exact for small angles
    return rate, slope * angle.sin() / rate


def clipped(t: Tensor) -> tuple[Tensor, Tensor]:
    """Rates uniform in `CLIPPED_RATES` (BD3-LM, arXiv:2503.09573): less variance, but the mean loss is no NELBO.

    It is the integrand of the NELBO averaged over these rates alone, on the same scale.
    """
    low, high = CLIPPED_RATES
    rate = high - (high - low) * (1 - t) / (1 - T_MIN)
    return rate, 1 / rate


# Each maps times in [T_MIN, 1] to masking rates 1 - alpha(t), which grow with t and so stay stratified, and to loss
# weights -alpha'(t) / (1 - alpha(t)) (MDLM, arXiv:2406.07524), scaled so that a response token counts once on average.
# The NELBO does not depend on alpha: linear and cosine have the same mean loss, from the rates that they draw more or
# less often.
NOISE_SCHEDULES = {"linear": linear, "cosine": cosine, "clipped": clipped}


# ---- Masks


def mask_tokens(
    x_0: LongTensor, rate: Tensor, uniforms: Tensor, is_maskable: Tensor, mask_token_id: int
) -> LongTensor:
    """Draw the noisy stream x_t from q(x_t | x_0): mask each maskable token of block n with probability rate[n].

    Args:
        x_0: [B, T] clean token ids; no maskable one equals `mask_token_id`.
        rate: [B, N] masking rate of each block, in (0, 1].
        uniforms: [B, N, L] in [0, 1), one for each token; N * L = T.
        is_maskable: [B, T] bool, True for response tokens. Prompt and padding are never masked.
        mask_token_id: id that replaces a masked token.
    """
    return x_0.masked_fill((uniforms < rate[..., None]).flatten(1) & is_maskable, mask_token_id)


def make_loss_inputs(
    x_0: LongTensor,
    labels: LongTensor,
    config: Config,
    key: tuple[int, int],
    rows: list[int],
    noise_schedule: str = "linear",
) -> dict[str, Tensor]:
    """Noise a batch and weight its loss: sum(loss_weights * CE) estimates the NELBO of the response tokens.

    Takes clean token ids [B, T], T a multiple of `config.block_size`; labels [B, T], all response tokens and -100
    elsewhere; for `key` and `rows` see `draw_uniforms`; a name in `NOISE_SCHEDULES`. Returns [B, T] each: what the
    model's forward takes, noisy_input_ids, labels, -100 where not masked, and loss_weights; and the masking_rate.
    """
    tokens, block_size = x_0.shape[1], config.block_size
    if tokens % block_size:
        raise ValueError(
            f"x_0 has {tokens} tokens, not a multiple of block_size={block_size}. "
            f"Pad it to {-(-tokens // block_size) * block_size}."
        )
    is_response = labels != IGNORE
    offset, uniforms = (u.to(x_0.device) for u in draw_uniforms(key, rows, tokens // block_size, block_size))
    t = sample_t(offset, uniforms[..., 0], is_response.unflatten(1, (-1, block_size)).any(-1))
    rate, weight = NOISE_SCHEDULES[noise_schedule](t)
    x_t = mask_tokens(x_0, rate, uniforms[..., 1:], is_response, config.mask_token_id)
    return {
        "noisy_input_ids": x_t,
        "labels": labels.masked_fill(x_t != config.mask_token_id, IGNORE),
        "loss_weights": weight.repeat_interleave(block_size, dim=-1),
        "masking_rate": rate.repeat_interleave(block_size, dim=-1),
    }
