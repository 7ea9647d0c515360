"""Which layers run in few Triton kernels. What these compute is in `layers_in_interpreter.py` and `test_gpu.py`."""

import pytest
import torch
from conftest import tiny_model, tokens
from peft import LoraConfig, get_peft_model
from torch import nn

from arclm import fused_arclm, modeling_arclm
from arclm.fused_arclm import use_fused_layer


@pytest.fixture
def asked(monkeypatch):
    """Take a CPU for a GPU, and collect what `usable` is asked; layers are the real ones."""
    questions = []
    monkeypatch.setattr(fused_arclm, "DEVICE", "cpu")
    monkeypatch.setattr(fused_arclm, "usable", lambda *question: questions.append(question) or True)
    return questions


def answers(model, monkeypatch, **inputs) -> list[bool]:
    """What each layer is told in a forward pass."""
    told = []

    def ask(*args):
        told.append(use_fused_layer(*args))

    monkeypatch.setattr(modeling_arclm, "use_fused_layer", ask)
    model(**(inputs or {"input_ids": tokens(1, 16), "use_cache": True}))
    return told


@torch.no_grad()
def test_passes_without_gradients_in_bfloat16_take_them(asked, monkeypatch):
    model = tiny_model().bfloat16()
    assert answers(model, monkeypatch) == [True] * 5
    cache = model(tokens(1, 16), use_cache=True).past_key_values
    assert answers(model, monkeypatch, noisy_input_ids=tokens(1, 16), past_key_values=cache) == [True] * 5
    name, _, dtype, classes, is_linear, *fields = asked[0]
    assert (name, dtype) == ("fused_layer", torch.bfloat16)
    assert (classes[0], classes[-1]) == (modeling_arclm.ArcLMDecoderLayer, modeling_arclm.ArcLMRMSNormGated)
    assert is_linear == model.model.layers[0].is_linear
    assert fields == [getattr(model.config, field) for field in fused_arclm.FIELDS]


@torch.no_grad()
def test_other_passes_do_not(asked, monkeypatch):
    model, x = tiny_model(), tokens(1, 16)
    assert not any(answers(model, monkeypatch))  # float32
    assert not any(answers(model.half(), monkeypatch))
    model.bfloat16()
    assert not any(answers(model, monkeypatch, input_ids=x, noisy_input_ids=x))  # two streams: training, NELBO
    with torch.enable_grad():
        assert not any(answers(model, monkeypatch))
    with torch.autocast("cpu", torch.bfloat16):
        assert not any(answers(model, monkeypatch))
    assert not any(answers(model.train(), monkeypatch))
    assert not asked
    # a row that fills a GPU by itself, and other attention: the full-attention layers are PyTorch's
    model.eval()
    linear = [layer.is_linear for layer in model.model.layers]
    assert answers(model, monkeypatch, input_ids=tokens(1, 300)) == linear
    model.set_attn_implementation("eager")
    assert answers(model, monkeypatch) == linear


class Doubled(nn.Linear):
    """A product of somebody else."""

    def forward(self, x):
        return 2 * super().forward(x)


CHANGES = {
    "a hook": lambda layer: layer.mlp.register_forward_hook(lambda *_: None),
    "a wrapped forward": lambda layer: setattr(layer.mlp, "forward", layer.mlp.forward),
    "another product": lambda layer: setattr(layer.mlp.down_proj, "__class__", Doubled),
    "a bias": lambda layer: setattr(layer.mlp.down_proj, "bias", nn.Parameter(torch.zeros(1))),
    "another layout": lambda layer: setattr(layer.mlp.down_proj.weight, "data", torch.ones(9, 7).bfloat16().T),
    "another dtype": lambda layer: layer.mlp.down_proj.float(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_somebody_changed_does_not(asked, change):
    layer = tiny_model().bfloat16().model.layers[0]
    assert fused_arclm._is_plain(layer, torch.device("cpu"))
    CHANGES[change](layer)
    assert not fused_arclm._is_plain(layer, torch.device("cpu"))


def test_a_layer_with_an_adapter_does_not(asked):
    model = get_peft_model(tiny_model().bfloat16(), LoraConfig(target_modules=["down_proj"], r=2))
    layer = model.get_base_model().model.layers[0]
    assert not fused_arclm._is_plain(layer, torch.device("cpu"))
