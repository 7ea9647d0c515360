"""The product that replaces `nn.Linear` without gradients is the same product."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch import nn

from arclm import layers_arclm
from arclm.layers_arclm import ArcLMLinear
from arclm.modeling_arclm import ArcLMForDiffusionLM


needs_onednn = pytest.mark.skipif(layers_arclm.ONEDNN_LINEAR is None, reason="torch was built without oneDNN")


@pytest.fixture
def products(monkeypatch):
    """Count the calls of oneDNN's product."""
    calls, product = [], layers_arclm.ONEDNN_LINEAR

    def counted(*args):
        calls.append(args)
        return product(*args)

    if product is not None:
        monkeypatch.setattr(layers_arclm, "ONEDNN_LINEAR", counted)
    return calls


@pytest.fixture(autouse=True)
def no_layer_is_too_small(monkeypatch):
    monkeypatch.setattr(layers_arclm, "MIN_WEIGHTS", 0)


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 64, 7), (3, 0, 7)])
def test_without_gradients_it_is_the_same_product(shape, bias, products):
    torch.manual_seed(0)
    layer = ArcLMLinear(7, 5, bias=bias)
    x = torch.randn(shape).transpose(0, -2) if len(shape) == 3 else torch.randn(shape)  # not contiguous
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-6)
    assert len(products) == (x.numel() > 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_left_to_torch(dtype, products):
    layer = ArcLMLinear(8, 8).to(dtype)
    with torch.no_grad():
        assert torch.equal(
            layer(torch.ones(2, 8, dtype=dtype)), F.linear(torch.ones(2, 8, dtype=dtype), layer.weight, layer.bias)
        )
    assert not products


@torch.no_grad()
def test_autocast_and_weights_of_other_kinds_are_left_to_torch(products):
    layer, x = ArcLMLinear(8, 8), torch.ones(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16

    class Quantised(nn.Parameter):
        pass

    layer.weight = Quantised(layer.weight)
    assert layer(x).shape == (2, 8)
    assert not products


def test_gradients_flow(products):
    layer = ArcLMLinear(8, 8)
    layer(torch.ones(2, 8)).sum().backward()
    assert layer.weight.grad is not None
    assert not products


def test_small_layers_are_left_to_torch(products, monkeypatch):
    monkeypatch.setattr(layers_arclm, "MIN_WEIGHTS", 65)
    with torch.no_grad():
        ArcLMLinear(8, 8)(torch.ones(2, 8))
    assert not products


def linears(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, nn.Linear)}


def test_every_product_of_the_model_is_of_this_kind():
    assert linears(tiny_model()) == {ArcLMLinear}


def test_bitsandbytes_finds_the_linear_layers_it_replaces(tmp_path):
    # it looks for layers that are exactly nn.Linear, and leaves all others as they are without a word
    model = tiny_model(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert linears(model) == {nn.Linear}
    tiny_model().save_pretrained(tmp_path)
    assert linears(ArcLMForDiffusionLM.from_pretrained(tmp_path)) == {ArcLMLinear}
