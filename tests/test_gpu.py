"""The same numbers on a GPU as on a CPU. Run by `make gpu`."""

import pytest
import torch
from conftest import MASK, tiny_model, tokens
from reference import blockwise_logits

from arclm import modeling_arclm
from arclm.kernels_arclm import usable


pytestmark = pytest.mark.gpu


def noisy_pair() -> tuple[torch.Tensor, torch.Tensor]:
    x_0 = tokens(2, 75)
    return x_0, x_0.masked_fill(torch.rand(x_0.shape, generator=torch.Generator().manual_seed(5)) < 0.5, MASK)


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


@pytest.mark.parametrize(("kernel", "problem"), [("affine_scan", (128, 128)), ("sample_rows", ())])
def test_every_kernel_passes_its_self_check_at_the_heads_of_the_model(kernel, problem):
    assert usable(kernel, torch.device("cuda", 0), *problem)


@torch.no_grad()
def test_layers_in_few_kernels_are_the_layers_on_a_gpu(monkeypatch):
    """With the heads of Qwen3.5-0.8B; a row of one block takes other kernels than three rows."""
    heads = {"head_dim": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_value_heads": 4}
    model = tiny_model(**heads, hidden_size=256, intermediate_size=512, block_size=64).to("cuda", torch.bfloat16)
    use_fused_layer, used = modeling_arclm.use_fused_layer, []
    for batch in (1, 3):
        x_0, x_t = tokens(batch, 192).cuda(), tokens(batch, 64, 1).cuda()
        mask = torch.ones_like(x_0)
        mask[1:, :70] = 0
        outputs = []
        for wanted in (True, False):
            monkeypatch.setattr(
                modeling_arclm, "use_fused_layer", lambda *x, wanted=wanted: used.append(use_fused_layer(*x)) or wanted
            )
            cache = model(x_0, attention_mask=mask, use_cache=True).past_key_values
            logits = model(noisy_input_ids=x_t, past_key_values=cache).logits
            outputs.append([logits, *(x for x in cache.keys + cache.recurrent_states if x is not None)])
        for fused, plain in zip(*outputs, strict=True):
            assert (fused - plain).float().norm() < 0.03 * plain.float().norm()
    assert all(used)
