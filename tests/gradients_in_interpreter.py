"""Kernels with gradients, run on a CPU by Triton's interpreter. `test_kernels_arclm.py` starts this file."""

import pytest
import torch
from conftest import layer_with_tiles
from torch.utils._python_dispatch import TorchDispatchMode

from arclm import loss_kernels_arclm
from arclm import trained_arclm as trained
from arclm.delta_gradients_arclm import Layout, two_stream_delta_rule
from arclm.fused_arclm import kind_of


CPU = torch.device("cpu")


def check(monkeypatch, is_linear: bool, block_size: int, tokens: int) -> float:
    monkeypatch.setattr(trained, "CHECK_TOKENS", tokens)
    with torch.no_grad():
        kind = kind_of(layer_with_tiles(is_linear=is_linear))
        return trained._check_trained_layer(CPU, torch.float32, block_size, *kind)


# whole blocks of one chunk; a last block that goes beyond the row, blocks of several chunks
@pytest.mark.parametrize(("is_linear", "block_size", "tokens"), [(True, 16, 48), (True, 48, 100), (False, 16, 24)])
def test_outputs_and_gradients_are_those_of_the_layer(monkeypatch, is_linear, block_size, tokens):
    assert check(monkeypatch, is_linear, block_size, tokens) < 1e-5


def test_the_self_check_sees_a_gradient_that_is_lost(monkeypatch):
    """That of the states from which the noisy blocks start."""
    delta_rule = trained.two_stream_delta_rule

    def without(qkv, g, beta, layout, **sizes):
        return delta_rule(qkv, g, beta, layout._replace(places=torch.full_like(layout.places, -1)), **sizes)

    monkeypatch.setattr(trained, "two_stream_delta_rule", without)
    assert check(monkeypatch, True, 16, 40) > 0.1


class States(TorchDispatchMode):
    """Counts the tensors of states [..., 16, 16] that are made."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += func is torch.ops.aten.new_empty.default and result.shape[-2:] == (16, 16)
        return result


def test_without_gradients_the_outputs_are_the_same_and_no_states_are_kept():
    layout = Layout.of(32, 16, torch.tensor([[0, 2]]), 32 + 40)
    generator, outputs = torch.Generator().manual_seed(0), []
    qkv, gates = (torch.randn(2, 72, width, generator=generator) for width in (2 * 16 + 2 * 16, 4))
    g, beta = -gates[..., :2].exp() * 0.1, gates[..., 2:].sigmoid()
    for needed, kept in ((True, 3), (False, 1)):  # those before blocks, and those before chunks of both streams
        with States() as states:
            g.requires_grad_(needed)
            outputs.append(two_stream_delta_rule(qkv * 0.2, g, beta, layout, key_heads=1, dim=16))
        assert states.count == kept
    assert torch.equal(*outputs)


def test_cross_entropy_over_pieces_of_the_vocabulary(monkeypatch):
    monkeypatch.setattr(loss_kernels_arclm, "TILE", 64)
    assert loss_kernels_arclm._check_cross_entropy(CPU, torch.float16) < 1e-5
