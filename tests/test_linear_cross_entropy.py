"""The loss that never holds all logits, against the plain one in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model, tokens
from peft import LoraConfig, get_peft_model

from arclm import linear_cross_entropy as module
from arclm.linear_cross_entropy import linear_cross_entropy


B, T, D, V = 3, 13, 5, 11


def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(V, (B, T), generator=generator)
    labels[torch.rand(B, T, generator=generator) < 0.4] = -100
    return hidden, weight, labels, torch.rand(B, T, generator=generator)


def plain(hidden, weight, labels, factor, num_items):
    losses = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * factor.flatten()).sum() / num_items


# one column of the vocabulary at a time, a few with a smaller last chunk, and all of it
@pytest.mark.parametrize("chunk_logits", [1, 4 * B * T, 2**24])
def test_value_and_gradients_equal_the_plain_loss(monkeypatch, chunk_logits):
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_logits)
    hidden, weight, labels, factor = inputs()
    loss = linear_cross_entropy(hidden, weight, labels, factor, 7)
    expected = plain(hidden, weight, labels, factor, 7)
    assert (loss - expected).abs() < 1e-12
    for grad, reference in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert (grad - reference).abs().max() < 1e-12


def test_the_gradient_of_the_loss_weights_is_the_cross_entropy_of_each_position():
    hidden, weight, labels, factor = inputs()
    loss = linear_cross_entropy(hidden, weight, labels, factor.requires_grad_(), 7)
    (grad,) = torch.autograd.grad(loss, factor)
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="none").view(B, T) / 7
    assert (grad - expected).abs().max() < 1e-6


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_do():
    hidden, weight, labels, factor = inputs()
    loss = linear_cross_entropy(hidden, weight.detach(), labels, factor, 7)
    (grad,) = torch.autograd.grad(loss, hidden)
    (expected,) = torch.autograd.grad(plain(hidden, weight, labels, factor, 7), hidden)
    assert (grad - expected).abs().max() < 1e-12


def test_autocast_computes_the_products_in_its_dtype():
    hidden, weight, labels, factor = (x.float() if x.is_floating_point() else x for x in inputs())
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, factor, 7)
        expected = plain(hidden, weight, labels, factor, 7)
    assert loss.dtype == torch.float32
    assert loss != linear_cross_entropy(hidden, weight, labels, factor, 7)
    assert (loss - expected).abs() < 1e-5
    for grad, reference in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert grad.dtype == torch.float32
        assert (grad - reference).abs().max() < 1e-2 * reference.abs().max()


def test_defaults_are_the_mean_over_targets():
    hidden, weight, labels, _ = inputs()
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
    assert (linear_cross_entropy(hidden, weight, labels) - expected).abs() < 1e-12


def test_no_target_gives_zero_and_zero_gradients():
    hidden, weight, labels, _ = inputs()
    loss = linear_cross_entropy(hidden, weight, labels.fill_(-100))
    assert loss == 0
    loss.backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_no_chunk_is_larger_than_the_limit(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 4 * B * T)
    sizes, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: sizes.append(linear(*args).numel()) or linear(*args))
    hidden, weight, labels, _ = inputs()
    linear_cross_entropy(hidden, weight, labels).backward()
    assert max(sizes) <= 4 * B * T
    assert sum(sizes) == 2 * V * (labels != -100).sum()  # once forward, once backward


def test_an_adapter_on_the_head_is_refused_and_a_copy_of_it_trained():
    x = tokens(1, 16)
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="name it in modules_to_save"):
        model(x, noisy_input_ids=x, labels=x)
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model(x, noisy_input_ids=x, labels=x).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
