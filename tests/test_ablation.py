"""The baseline of benchmarks/ablation.py: one scan over [x_t ; x_0], and denoising without a state."""

import one_scan
import pytest
import torch
import torch.nn.functional as F
from conftest import MASK, tiny_config, tiny_model, tokens
from reference import blockwise_logits, delta_rule_steps

from arclm.streams_arclm import Streams


BATCH, BLOCK, BLOCKS = 3, 7, 5
LINEAR = {"layer_types": ["linear_attention"] * 3, "num_hidden_layers": 3}
ATTENTION = {"layer_types": ["full_attention"] * 3, "num_hidden_layers": 3}


def twin(model, cls):
    """Return a model of another class with the weights of `model`."""
    other = cls(model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 and x_t [BATCH, BLOCKS * BLOCK], where x_t has masks in every block."""
    x_0 = tokens(BATCH, BLOCKS * BLOCK, seed)
    is_masked = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    is_masked[:, ::BLOCK] = True
    return x_0, x_0.masked_fill(is_masked, MASK)


def blocks(x: torch.Tensor) -> torch.Tensor:
    """[B, T, V] -> [B, N, L, V]."""
    return x.unflatten(1, (BLOCKS, BLOCK))


@pytest.mark.parametrize("cls", [one_scan.OneScanForDiffusionLM, one_scan.DroppedStateForDiffusionLM])
def test_without_linear_attention_all_models_are_one(cls):
    model = tiny_model(block_size=BLOCK, **ATTENTION)
    x_0, x_t = rows()
    labels = x_0.masked_fill((x_t != MASK) | (torch.arange(x_0.shape[1]) < 2 * BLOCK), -100)  # two blocks of prompt
    other = twin(model, cls)
    torch.testing.assert_close(other(x_0, noisy_input_ids=x_t).logits, model(x_0, noisy_input_ids=x_t).logits)
    losses = [m(x_0, noisy_input_ids=x_t, labels=labels).loss for m in (model, other)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("shifted", [False, True])
def test_one_scan_equals_arclm_in_the_first_block_only(shifted):
    model = tiny_model(block_size=BLOCK, right_shift_logits=shifted)
    x_0, x_t = rows()
    ours = blocks(model(x_0, noisy_input_ids=x_t).logits)
    theirs = blocks(twin(model, one_scan.OneScanForDiffusionLM)(x_0, noisy_input_ids=x_t).logits)
    torch.testing.assert_close(theirs[:, 0], ours[:, 0])
    distance = (theirs - ours).abs().amax((0, 2, 3))
    assert (distance[1:] > 1e-2).all(), distance


def test_linear_layers_in_one_scan_differ_from_arclm_where_the_past_is_noisy():
    """No attention, so nothing but the scan tells: blocks 0 to 2 are a prompt, which is never masked."""
    model = tiny_model(block_size=BLOCK, **LINEAR)
    x_0, x_t = rows()
    x_t[:, : 3 * BLOCK] = x_0[:, : 3 * BLOCK]
    ours = blocks(model(x_0, noisy_input_ids=x_t).logits)
    theirs = blocks(twin(model, one_scan.OneScanForDiffusionLM)(x_0, noisy_input_ids=x_t).logits)
    torch.testing.assert_close(theirs[:, :4], ours[:, :4], atol=1e-4, rtol=1e-4)
    assert (theirs[:, 4] - ours[:, 4]).abs().max() > 1e-2


def test_the_loss_of_one_scan_reads_noisy_blocks_without_labels_too():
    model = twin(tiny_model(block_size=BLOCK), one_scan.OneScanForDiffusionLM)
    x_0, x_t = rows()
    labels = x_0.masked_fill((x_t != MASK) | (torch.arange(x_0.shape[1]) < 3 * BLOCK), -100)
    logits = model(x_0, noisy_input_ids=x_t).logits
    loss = model(x_0, noisy_input_ids=x_t, labels=labels).loss
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_noise_reaches_the_clean_stream_of_one_scan_only():
    model = tiny_model(block_size=BLOCK)
    x_0, x_t = rows()
    changed = x_t.clone()
    changed[:, -1] = (x_t[:, -1] + 1) % MASK
    distances = []
    for each in (model, twin(model, one_scan.OneScanForDiffusionLM)):
        clean = [each.model(x_0, noisy_input_ids=noisy).clean_last_hidden_state for noisy in (x_t, changed)]
        distances.append((clean[0] - clean[1]).abs().amax((0, 2)))
    assert distances[0].max() == 0, "Noise has leaked into arcLM's clean stream."
    # the last noisy token is read before the first clean one
    assert distances[1][0] > 1e-3, "The baseline does not scan x_t before x_0."


def test_one_scan_is_the_recurrence_over_the_concatenation():
    config = tiny_config(block_size=BLOCK, layer_types=["linear_attention", "full_attention"], num_hidden_layers=2)
    torch.manual_seed(0)
    mixer = one_scan.OneScanForDiffusionLM(config).model.layers[0].linear_attn
    mixer.A_log.data.uniform_(0.001, 0.1).log_()
    hidden = torch.randn(BATCH, 2 * BLOCKS * BLOCK, config.hidden_size)
    x_0, x_t = rows()
    _, streams = Streams.of(x_0, x_t, None, block_size=BLOCK)
    output = mixer(hidden, streams, None)

    mixed = mixer.in_proj_qkv(hidden)
    convolved = F.conv1d(mixed.mT, mixer.conv1d.weight, padding=mixer.kernel - 1, groups=mixed.shape[-1])[
        ..., : mixed.shape[1]
    ]
    beta = mixer.in_proj_b(hidden).sigmoid()
    g = -mixer.A_log.exp() * F.softplus(mixer.in_proj_a(hidden) + mixer.dt_bias)
    inputs = mixer._heads(F.silu(convolved).mT, beta, g)
    state = torch.zeros(BATCH, 4, 10, 14)
    steps, _ = delta_rule_steps(inputs, state, range(mixed.shape[1]))
    gate = mixer.in_proj_z(hidden).unflatten(-1, (-1, mixer.head_v_dim))
    expected = mixer.out_proj(mixer.norm(torch.stack(steps, 1), gate).flatten(2))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", [one_scan.OneScanForDiffusionLM, one_scan.DroppedStateForDiffusionLM])
def test_padding_changes_nothing(cls):
    model = twin(tiny_model(block_size=BLOCK), cls)
    x_0, x_t = rows()
    short = 3 * BLOCK
    mask = torch.ones_like(x_0)
    mask[1, short:] = 0
    batch = model(x_0, mask, noisy_input_ids=x_t).logits
    alone = model(x_0[1:2, :short], noisy_input_ids=x_t[1:2, :short]).logits
    torch.testing.assert_close(batch[1:2, :short], alone, atol=1e-5, rtol=1e-4)


def test_dropped_state_in_one_pass_equals_denoising_over_the_cache():
    model = twin(tiny_model(block_size=BLOCK, right_shift_logits=True), one_scan.DroppedStateForDiffusionLM)
    x_0, x_t = rows()
    one_pass = model(x_0, noisy_input_ids=x_t).logits
    torch.testing.assert_close(one_pass, blockwise_logits(model, x_0, x_t), atol=1e-4, rtol=1e-4)


def test_dropped_state_keeps_the_clean_stream_and_loses_the_past_of_a_block():
    model = tiny_model(block_size=BLOCK)
    x_0, x_t = rows()
    dropped = twin(model, one_scan.DroppedStateForDiffusionLM)
    ours, theirs = (m.model(x_0, noisy_input_ids=x_t) for m in (model, dropped))
    torch.testing.assert_close(theirs.clean_last_hidden_state, ours.clean_last_hidden_state)
    distance = blocks(theirs.last_hidden_state - ours.last_hidden_state).abs().amax((0, 2, 3))
    assert distance[0] < 1e-5
    assert (distance[1:] > 1e-2).all(), distance


def test_generate_without_a_state_denoises_a_block_as_without_context_in_a_linear_model():
    model = twin(tiny_model(block_size=BLOCK, **LINEAR), one_scan.DroppedStateForDiffusionLM)
    prompts = tokens(2, 2 * BLOCK)
    output = model.generate(prompts, max_new_tokens=2 * BLOCK, do_sample=False, eos_token_id=None)
    new = output[:, 2 * BLOCK :]
    assert torch.equal(new[0], new[1]), "Without state and attention the prompt cannot matter."
    assert torch.equal(new[:, :BLOCK], new[:, BLOCK:]), "Each block starts from nothing."
