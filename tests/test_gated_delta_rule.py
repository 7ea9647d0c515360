"""The chunked delta rule against the token-by-token recurrence, forward and backward, in float64."""

import pytest
import torch
import torch.nn.functional as F
from reference import delta_rule_steps, two_stream_delta_rule

from arclm.gated_delta_rule import AffineScan, DeltaRuleInputs, gated_delta_rule


B, H, HK, K, V = 3, 4, 2, 5, 7


def stream(length: int, seed: int, decay: float = 1.0, dtype=torch.float64) -> DeltaRuleInputs:
    """Random inputs [3, length, ...]; `decay` scales the log decay, so 60 forgets at once and 0.001 never."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k, v = normal(B, length, HK, K), normal(B, length, HK, K), normal(B, length, H, V)
    g, beta = F.logsigmoid(normal(B, length, H)) * decay, normal(B, length, H).sigmoid()
    return DeltaRuleInputs(*(x.requires_grad_() for x in (q, k, v, g, beta)))


def initial_state(seed: int = 7) -> torch.Tensor:
    return torch.randn(B, H, K, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def gradients(outputs, inputs):
    generator = torch.Generator().manual_seed(3)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
    return torch.autograd.grad(loss, inputs)


def two_streams(clean: DeltaRuleInputs, noisy: DeltaRuleInputs, block_size: int, state: torch.Tensor | None = None):
    """Both streams as the model runs them: the noisy blocks are a batch of their own, started from the boundaries."""
    length = clean.q.shape[1]
    clean_output, final_state, boundary_states = gated_delta_rule(clean, state, block_size)

    def blocks(x: torch.Tensor) -> torch.Tensor:
        pad = -length % block_size
        x = torch.cat((x, x.new_zeros(len(x), pad, *x.shape[2:])), 1)
        return x.unflatten(1, (-1, block_size)).flatten(0, 1)

    noisy_output, _, _ = gated_delta_rule(DeltaRuleInputs(*map(blocks, noisy)), boundary_states.flatten(0, 1))
    return clean_output, noisy_output.unflatten(0, (len(clean.q), -1)).flatten(1, 2)[:, :length], final_state


@pytest.mark.parametrize("decay", [0.001, 1.0, 60.0])
# block sizes below, at and above the chunk of 64, dividing it and not; lengths that are not multiples of anything
@pytest.mark.parametrize(
    ("block_size", "length"),
    [(1, 67), (4, 130), (16, 75), (20, 71), (32, 128), (64, 13), (64, 200), (65, 131), (128, 300)],
)
def test_two_streams_equal_the_recurrence_and_its_gradients(block_size, length, decay):
    clean, noisy, state = stream(length, 0, decay), stream(length, 1, decay), initial_state()
    outputs = two_streams(clean, noisy, block_size, state)
    expected = two_stream_delta_rule(clean, noisy, block_size, state)
    for output, reference in zip(outputs, expected, strict=True):
        assert (output - reference).abs().max() < 1e-10
    inputs = [*clean, *noisy, state]
    for grad, reference in zip(gradients(outputs, inputs), gradients(expected, inputs), strict=True):
        assert (grad - reference).abs().max() < 1e-8


@pytest.mark.parametrize("length", [1, 13, 64, 65, 200])
def test_one_stream_equals_the_recurrence_and_its_gradients(length):
    inputs, state = stream(length, 0), initial_state()
    outputs = gated_delta_rule(inputs, state)[:2]
    reference, final = delta_rule_steps(inputs, state, range(length))
    expected = torch.stack(reference, 1), final
    for output, value in zip(outputs, expected, strict=True):
        assert (output - value).abs().max() < 1e-10
    for grad, value in zip(gradients(outputs, [*inputs, state]), gradients(expected, [*inputs, state]), strict=True):
        assert (grad - value).abs().max() < 1e-8


def test_tokens_without_beta_and_g_leave_the_state_as_it_is():
    inputs, state = stream(100, 0), initial_state()
    inert = inputs._replace(beta=inputs.beta * 0, g=inputs.g * 0)
    assert torch.equal(gated_delta_rule(inert, state)[1], state)


@pytest.mark.parametrize("block_size", [16, 64])
def test_bfloat16_inputs_keep_a_float32_state(block_size):
    clean, noisy = (DeltaRuleInputs(*(x.detach().bfloat16() for x in stream(150, seed))) for seed in (0, 1))
    clean_output, noisy_output, state = two_streams(clean, noisy, block_size)
    assert clean_output.dtype == noisy_output.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    exact = [DeltaRuleInputs(*(x.double() for x in inputs)) for inputs in (clean, noisy)]
    expected = two_stream_delta_rule(*exact, block_size, torch.zeros(B, H, K, V, dtype=torch.float64))
    # the inputs are the same numbers: only the outputs are rounded to bfloat16, 8 bits
    assert (state - expected[2]).abs().max() < 1e-5
    for output, reference in zip((clean_output, noisy_output), expected, strict=False):
        assert (output - reference).abs().max() < 2**-8 * reference.abs().max()


@pytest.mark.parametrize("block_size", [16, 64])
def test_extreme_decay_stays_finite_in_float32(block_size):
    clean, noisy = (stream(150, seed, decay=500.0, dtype=torch.float32) for seed in (0, 1))
    outputs = two_streams(clean, noisy, block_size)
    assert all(torch.isfinite(x).all() for x in (*outputs, *gradients(outputs, [*clean, *noisy])))


def test_state_does_not_drift_over_512_blocks_of_one_token():
    """512 commits of a token in float32 against one float64 pass: the recurrence contracts, errors must not grow."""
    inputs = stream(512, 0, decay=0.01)
    state = None
    for t in range(512):
        _, state, _ = gated_delta_rule(DeltaRuleInputs(*(x[:, t : t + 1].float() for x in inputs)), state)
    _, expected = delta_rule_steps(inputs, torch.zeros(B, H, K, V, dtype=torch.float64), range(512))
    assert expected.abs().max() > 0.1
    assert (state - expected).abs().max() < 1e-5 * expected.abs().max()


def test_affine_scan_gradient():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 3, 5, 5), (2, 4, 3, 5, 7), (2, 3, 5, 7)]
    inputs = [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(AffineScan.apply, inputs)


@pytest.mark.parametrize("length", [13, 130])
def test_autocast_changes_nothing(length):
    """Training with bf16=True is under autocast and generation is not; both have to compute the same."""
    inputs = stream(length, 0, dtype=torch.float32)
    expected = gated_delta_rule(inputs, None, 16)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = gated_delta_rule(inputs, None, 16)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
