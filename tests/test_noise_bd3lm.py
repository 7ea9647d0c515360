"""The noise: keyed random numbers, stratified times, schedules with their weights, masks."""

import math
from itertools import product

import pytest
import torch
from conftest import tiny_config

from arclm import noise_bd3lm as noise
from arclm.data_bd3lm import IGNORE
from arclm.noise_bd3lm import NOISE_SCHEDULES, draw_uniforms, make_loss_inputs


# distinct primes: a confused dimension cannot pass by luck
B, N, L, MASK = 2, 3, 5, 11


def test_noise_of_a_row_depends_on_its_key_and_number_only():
    offset, uniforms = draw_uniforms((7, 3), [4, 0, 2], N, L)
    alone_offset, alone = draw_uniforms((7, 3), [2], N + 4, L)
    assert uniforms.shape == (3, N, 1 + L)
    assert offset[2] == alone_offset[0]
    assert torch.equal(uniforms[2], alone[0, :N])  # padding adds blocks at the end
    others = [draw_uniforms(key, [row], N, L)[1] for key, row in [((7, 4), 2), ((8, 3), 2), ((7, 3), 3), ((3, 7), 2)]]
    assert not any(torch.isclose(uniforms[2], other).any() for other in others)


def test_each_block_with_response_gets_its_own_part_of_the_times():
    has_response = torch.tensor([[False, False, True], [False, True, True], [True, True, True]])
    offset, uniforms = draw_uniforms((0, 0), [0, 1, 2], 3, L)
    t = noise.sample_t(offset, uniforms[..., 0], has_response)
    assert (t[~has_response] == 1).all()
    for row, num_parts in zip(range(3), [1, 2, 3], strict=True):
        u = (1 - t[row][has_response[row]]) / (1 - noise.T_MIN)  # [0, 1) back from [T_MIN, 1]
        assert (u * num_parts).floor().sort().values.tolist() == list(range(num_parts))
        torch.testing.assert_close(u * num_parts % 1, offset[row].expand(num_parts), rtol=0, atol=1e-5)


def test_times_of_single_blocks_are_stratified_over_the_rows_of_a_step():
    offset, uniforms = draw_uniforms((0, 5), list(range(97)), 1, L)
    t = noise.sample_t(offset, uniforms[..., 0], torch.ones(97, 1, dtype=torch.bool)).flatten().sort().values
    # independent times leave a gap of about ln(97) / 97; the golden ratio sequence none above 2.62 / 97
    assert t.diff().max() < 2.7 / 97


def test_the_time_of_every_block_is_uniform():
    draws = [draw_uniforms((0, step), [0, 1], N, L) for step in range(2000)]
    has_response = torch.ones(B, N, dtype=torch.bool)
    t = torch.cat([noise.sample_t(offset, uniforms[..., 0], has_response) for offset, uniforms in draws])
    assert t.equal(t.clamp(noise.T_MIN, 1))
    shares = torch.stack([torch.histc(t[:, n], 10, 0, 1) for n in range(N)]) / len(t)
    assert (shares - 0.1).abs().max() < 0.025  # 5 standard deviations


def test_mask_tokens_uses_the_rate_of_each_block():
    rows = 400
    x_0 = torch.randint(MASK, (rows, N * L), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 0.3, 1.0]).expand(rows, N)
    uniforms = draw_uniforms((0, 0), list(range(rows)), N, L)[1][..., 1:]
    uniforms[:, 2] = 1 - 2**-24  # the largest that there is
    x_t = noise.mask_tokens(x_0, t, uniforms, torch.ones_like(x_0, dtype=torch.bool), MASK)
    is_masked = x_t == MASK
    assert torch.equal(x_t[~is_masked], x_0[~is_masked])
    rates = is_masked.view(rows, N, L).float().mean((0, 2))
    assert rates[[0, 2]].tolist() == [0, 1]
    assert abs(rates[1] - 0.3) < 0.05


def test_loss_inputs_equal_the_case_by_hand(monkeypatch):
    # one row, prompt of 1 token, blocks of 2: [p a | b c | pad pad]; the first two blocks hold response
    x_0, labels = torch.tensor([[9, 1, 2, 3, 0, 0]]), torch.tensor([[IGNORE, 1, 2, 3, IGNORE, IGNORE]])
    # rank of the second block 0, of the first 1
    uniforms = torch.tensor([[[0.9, 0.0, 0.2], [0.1, 0.8, 0.7], [0.0, 0.0, 0.0]]])
    monkeypatch.setattr(noise, "draw_uniforms", lambda *_: (torch.tensor([0.5]), uniforms))
    inputs = make_loss_inputs(x_0, labels, tiny_config(block_size=2, mask_token_id=MASK), (0, 0), [0])
    t = [1 - 0.999 * 0.75, 1 - 0.999 * 0.25]  # 0.25075 and 0.75025
    # 0.2 < t[0] masks a; 0.8 > t[1] keeps b; 0.7 < t[1] masks c; prompt and padding stay though their number is 0
    assert inputs["noisy_input_ids"].tolist() == [[9, MASK, 2, MASK, 0, 0]]
    assert inputs["labels"].tolist() == [[IGNORE, 1, IGNORE, 3, IGNORE, IGNORE]]
    expected = torch.tensor([[1 / t[0]] * 2 + [1 / t[1]] * 2 + [1.0] * 2])
    torch.testing.assert_close(inputs["loss_weights"], expected)


# mean masking rates: 1 / 2, 1 - 2 / pi and (0.3 + 0.8) / 2, the first two without the share below T_MIN
@pytest.mark.parametrize(("schedule", "mean_rate"), [("linear", 0.5005), ("cosine", 0.374), ("clipped", 0.55)])
def test_weights_of_masked_tokens_count_each_response_token_once_on_average(schedule, mean_rate):
    labels = torch.full((B, N * L), IGNORE)
    labels[0, 4:], labels[1, 7:12] = 1, 1
    x_0, config, total, masked = torch.ones_like(labels), tiny_config(block_size=L, mask_token_id=MASK), 0.0, 0
    for step in range(2000):
        inputs = make_loss_inputs(x_0, labels, config, (1, step), [0, 1], schedule)
        is_masked = inputs["labels"] != IGNORE
        total += inputs["loss_weights"][is_masked].sum().item()
        masked += is_masked.sum().item()
    response_tokens = 2000 * (labels != IGNORE).sum().item()
    assert total / response_tokens == pytest.approx(1, abs=0.05)
    assert masked / response_tokens == pytest.approx(mean_rate, abs=0.01)


def test_loss_inputs_name_the_length_that_would_fit():
    x_0 = torch.zeros(1, 14, dtype=torch.long)
    with pytest.raises(ValueError, match=r"x_0 has 14 tokens.*block_size=5.*Pad it to 15"):
        make_loss_inputs(x_0, x_0, tiny_config(block_size=5), (0, 0), [0])


# ---- Schedules


def times(count: int = 100_000) -> torch.Tensor:
    """Times in the middle of equal parts of [T_MIN, 1]: a mean over them is one over the draws of `sample_t`."""
    return 1 - (1 - noise.T_MIN) * (torch.arange(count, dtype=torch.float64) + 0.5) / count


def share_below(rate: float, schedule: str) -> float:
    """How often a schedule draws a lower rate, from its definition."""
    if schedule == "cosine":  # rate = 1 - cos(angle), the angle uniform
        lowest = math.acos(1 - noise.T_MIN)
        return (math.acos(1 - rate) - lowest) / (math.pi / 2 - lowest)
    low, high = (0.3, 0.8) if schedule == "clipped" else (noise.T_MIN, 1)
    return (rate - low) / (high - low)


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_rates_are_distributed_as_the_schedule_says(schedule):
    rate, _ = NOISE_SCHEDULES[schedule](times())
    for bound in (0.31, 0.5, 0.79):
        assert (rate < bound).double().mean().item() == pytest.approx(share_below(bound, schedule), abs=1e-4)
    low, high = (0.3, 0.8) if schedule == "clipped" else (noise.T_MIN, 1)
    ends, _ = NOISE_SCHEDULES[schedule](torch.tensor([noise.T_MIN, 1.0]))  # float32, as in training
    torch.testing.assert_close(ends, torch.tensor([low, high]), rtol=1e-4, atol=0)
    assert (rate.diff() < 0).all()  # the times fall: what is stratified in time is so in rate


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_blocks_of_a_row_are_stratified_under_every_schedule(schedule):
    labels = torch.ones(2, 7 * L, dtype=torch.long)
    inputs = make_loss_inputs(labels, labels, tiny_config(block_size=L, mask_token_id=MASK), (3, 1), [4, 5], schedule)
    rates = inputs["masking_rate"][:, ::L].sort().values
    shares = torch.tensor([[share_below(rate, schedule) for rate in row] for row in rates.tolist()])
    assert (shares * 7).floor().tolist() == [list(range(7))] * 2
    assert not torch.isclose(rates[0], rates[1]).any()


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_weights_are_the_slope_of_the_rate_over_the_rate(schedule):
    t = times(97).requires_grad_()
    rate, weight = NOISE_SCHEDULES[schedule](t)
    (slope,) = torch.autograd.grad(rate.sum(), t)  # -alpha'(t)
    drawn = 0.5 if schedule == "clipped" else 1 - noise.T_MIN
    torch.testing.assert_close(weight, slope / rate * (1 - noise.T_MIN) / drawn)


def masked_losses(length: int) -> dict[tuple[int, ...], float]:
    """A toy model: to each set of masked positions of a block the sum of their cross-entropies."""
    generator = torch.Generator().manual_seed(0)
    masks = product((0, 1), repeat=length)
    return {mask: sum(mask) ** 2 * torch.rand((), generator=generator).item() for mask in masks}


def expected_loss(rate: torch.Tensor, weight: torch.Tensor, losses: dict[tuple[int, ...], float]) -> float:
    """The mean over times and, exactly, over masks of the weighted loss of a block."""
    terms = [rate ** sum(mask) * (1 - rate) ** (len(mask) - sum(mask)) * loss for mask, loss in losses.items()]
    return (weight * sum(terms)).mean().item()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_mean_loss_is_the_nelbo_whatever_the_schedule(schedule):
    losses = masked_losses(4)
    # the NELBO by enumeration: every number of masked tokens equally often, every set of so many equally often, its
    # loss divided by its number of tokens for each of the 4 (LLaDA, arXiv:2502.09992, equation 14)
    nelbo = sum(loss / sum(mask) / math.comb(4, sum(mask)) for mask, loss in losses.items() if any(mask))
    mean = expected_loss(*NOISE_SCHEDULES[schedule](times()), losses)
    assert mean == pytest.approx(nelbo, rel=2e-3)  # without rates below T_MIN
    assert mean == pytest.approx(expected_loss(*NOISE_SCHEDULES["linear"](times()), losses), rel=1e-6)


def test_the_mean_loss_of_clipped_is_the_integrand_of_the_nelbo_over_its_rates():
    losses = masked_losses(4)
    rate = torch.linspace(0.3, 0.8, 100_001, dtype=torch.float64)
    mean = expected_loss(*NOISE_SCHEDULES["clipped"](times()), losses)
    assert mean == pytest.approx(expected_loss(rate, 1 / rate, losses), rel=1e-4)
    assert abs(mean / expected_loss(*NOISE_SCHEDULES["linear"](times()), losses) - 1) > 0.01


def test_drawn_masks_have_the_mean_loss_of_the_schedule():
    losses, length, rows = masked_losses(3), 3, 20_000
    x_0, config = torch.ones(rows, length, dtype=torch.long), tiny_config(block_size=length, mask_token_id=MASK)
    means = {}
    for schedule in NOISE_SCHEDULES:
        inputs = make_loss_inputs(x_0, x_0, config, (0, 0), list(range(rows)), schedule)
        masks = (inputs["labels"] != IGNORE).int().tolist()
        of_rows = torch.tensor([losses[tuple(mask)] for mask in masks])
        means[schedule] = (of_rows * inputs["loss_weights"][:, 0]).mean().item()
        expected = expected_loss(*NOISE_SCHEDULES[schedule](times()), losses)
        assert means[schedule] == pytest.approx(expected, rel=0.05), schedule
    assert means["linear"] == pytest.approx(means["cosine"], rel=0.05)
