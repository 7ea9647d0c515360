"""The same numbers on a GPU as on a CPU. Run by `make gpu`."""

from pathlib import Path

import pytest
import torch
from conftest import MASK, noisy, tiny_model, tokens
from reference import blockwise_logits

from arclm import modeling_arclm
from arclm.configuration_arclm import ArcLMConfig
from arclm.fused_arclm import kind_of
from arclm.kernels_arclm import usable
from arclm.linear_cross_entropy import linear_cross_entropy


pytestmark = pytest.mark.gpu
KERNELS = {"affine_scan": (128, 128), "sample_rows": (), "cross_entropy": (torch.bfloat16,)}
LAYERS = {"fused_layer": (torch.bfloat16,), "trained_layer": (torch.bfloat16, 64)}


def noisy_pair() -> tuple[torch.Tensor, torch.Tensor]:
    return tokens(2, 75), noisy(tokens(2, 75))


@torch.no_grad()
def test_logits_and_rule_e1_on_a_gpu():
    x_0, x_t = noisy_pair()
    model = tiny_model()
    expected = model(x_0, noisy_input_ids=x_t).logits
    model, x_0, x_t = model.cuda(), x_0.cuda(), x_t.cuda()
    one_pass = model(x_0, noisy_input_ids=x_t).logits
    assert (one_pass.cpu() - expected).abs().max() < 1e-3
    assert (one_pass - blockwise_logits(model, x_0, x_t)).abs().max() < 1e-3


def test_gradients_on_a_gpu():
    x_0, x_t = noisy_pair()
    labels = torch.where(x_t == MASK, x_0, -100)
    grads = []
    for device in ("cpu", "cuda"):
        model = tiny_model().to(device)
        model(x_0.to(device), noisy_input_ids=x_t.to(device), labels=labels.to(device)).loss.backward()
        grads.append([p.grad.cpu() for p in model.parameters()])
    assert all((a - b).abs().max() < 1e-3 for a, b in zip(*grads, strict=True))


def test_bfloat16_trains_and_generates_on_a_gpu():
    x_0, x_t = (x.cuda() for x in noisy_pair())
    model = tiny_model().cuda().bfloat16()
    model(x_0, noisy_input_ids=x_t, labels=torch.where(x_t == MASK, x_0, -100)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    greedy = [model.generate(x_0, max_new_tokens=20, do_sample=False) for _ in range(2)]
    assert torch.equal(*greedy)
    assert not (greedy[0] == MASK).any()


@pytest.mark.parametrize(("kernel", "problem"), KERNELS.items())
def test_every_kernel_passes_its_self_check_at_the_heads_of_the_model(kernel, problem):
    assert usable(kernel, torch.device("cuda", 0), *problem)


@pytest.mark.parametrize(("kernel", "problem"), LAYERS.items())
@pytest.mark.parametrize("layer_type", ["linear_attention", "full_attention"])
def test_layers_pass_their_self_checks_at_the_shapes_of_the_model(kernel, problem, layer_type):
    config = ArcLMConfig.from_pretrained(Path(__file__).resolve().parents[1])
    with torch.device("meta"):
        layer = modeling_arclm.ArcLMDecoderLayer(config, config.layer_types.index(layer_type))
    assert usable(kernel, torch.device("cuda", 0), *problem, *kind_of(layer))


HEADS = {"head_dim": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_value_heads": 4}
SHAPES = {**HEADS, "hidden_size": 256, "intermediate_size": 512, "block_size": 64}  # heads as those of Qwen3.5-0.8B


def in_three_ways(monkeypatch, name: str, run) -> list[list[float]]:
    """How far what `run` gives is from float32: in bfloat16 by kernels, and by PyTorch.

    `run` takes a float32 model and whether to use bfloat16; `name` is the question that layers ask.
    """
    run(tiny_model(**SHAPES).cuda(), True)  # the self-checks come first: their PyTorch layers ask, too
    use, used, results = getattr(modeling_arclm, name), [], []
    for use_bfloat16, by_kernel in ((False, False), (True, True), (True, False)):
        monkeypatch.setattr(
            modeling_arclm, name, lambda *x, wanted=by_kernel: wanted and (used.append(use(*x)) or used[-1])
        )
        results.append(run(tiny_model(**SHAPES).cuda(), use_bfloat16))
    assert used
    assert all(used)
    return [
        [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(result, results[0], strict=True)]
        for result in results[1:]
    ]


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])  # a row of one block takes other kernels than three rows
def test_layers_in_few_kernels_are_the_layers_on_a_gpu(monkeypatch, batch):
    x_0, x_t, mask = tokens(batch, 192).cuda(), tokens(batch, 64, 1).cuda(), torch.ones(batch, 192).long().cuda()
    mask[1:, :64] = 0

    def run(model, use_bfloat16: bool) -> list[torch.Tensor]:
        model = model.bfloat16() if use_bfloat16 else model
        cache = model(x_0, attention_mask=mask, use_cache=True).past_key_values
        logits = model(noisy_input_ids=x_t, past_key_values=cache).logits
        both = model(x_0[:, :64], noisy_input_ids=x_t, past_key_values=cache, use_cache=True).logits
        return [logits, both, *(x for x in cache.recurrent_states if x is not None)]

    by_kernels, by_pytorch = in_three_ways(monkeypatch, "use_fused_layer", run)
    assert sum(by_kernels) < 1.5 * sum(by_pytorch)


def test_layers_with_gradients_are_the_layers_on_a_gpu(monkeypatch):
    x_0, x_t, mask = tokens(2, 150).cuda(), noisy(tokens(2, 150)).cuda(), torch.ones(2, 150).long().cuda()
    mask[1, :40] = 0
    labels = torch.where((x_t == MASK) & (mask == 1), x_0, -100)

    def run(model, use_bfloat16: bool) -> list[torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=use_bfloat16):  # as the Trainer
            loss = model(x_0, mask, noisy_input_ids=x_t, labels=labels).loss
            with torch.no_grad():
                logits = model(x_0, mask, noisy_input_ids=x_t).logits[mask == 1]
        loss.backward()
        return [loss.detach(), logits, *(parameter.grad for parameter in model.parameters())]

    by_kernels, by_pytorch = in_three_ways(monkeypatch, "use_trained_layer", run)
    assert sum(by_kernels) < 1.5 * sum(by_pytorch)
    assert max(by_kernels) < 4 * max(by_pytorch)  # the few gates of a layer vary most


@torch.no_grad()
def test_training_computes_what_inference_computes_on_a_gpu():
    """Rule E1 in bfloat16: two streams by the kernels of training, block by block by those of inference."""
    x_0, x_t, model = tokens(1, 192).cuda(), noisy(tokens(1, 192)).cuda(), tiny_model(**SHAPES).cuda()
    exact, model = model(x_0, noisy_input_ids=x_t).logits, model.bfloat16()
    for logits in (model(x_0, noisy_input_ids=x_t).logits, blockwise_logits(model, x_0, x_t)):
        assert (logits.float() - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_and_its_gradient_on_a_gpu(dtype):
    """Over several pieces of the vocabulary, against all logits at once in float64."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator, device="cuda") / 64**0.25 for n in (300, 250_001))
    labels = torch.randint(250_001, (1, 300), generator=generator, device="cuda")
    factor = torch.rand(1, 300, generator=generator, device="cuda") + 0.5
    hidden, weight = hidden[None].to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, factor)
    grads = torch.autograd.grad(loss, (hidden, weight))
    inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    losses = torch.nn.functional.cross_entropy((inputs[0] @ inputs[1].T)[0], labels[0], reduction="none")
    expected = (losses * factor[0].double()).mean()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    assert abs(loss.item() / expected.item() - 1) < tolerance
    for grad, exact in zip(grads, torch.autograd.grad(expected, inputs), strict=True):
        assert (grad - exact).norm() < tolerance * exact.norm()
