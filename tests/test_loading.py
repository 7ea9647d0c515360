"""The front door: a saved directory, copied elsewhere, opens through the auto classes and is the same model."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel


ROOT = Path(__file__).resolve().parents[1]
FLOAT32 = ("A_log", "linear_attn.norm.weight")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A bfloat16 model, saved, then copied to a directory of another name."""
    first = tmp_path_factory.mktemp("saved") / "first"
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name.endswith(FLOAT32) else torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(first)
    copy = first.parent / "somewhere else v1.0"
    shutil.copytree(first, copy)
    shutil.rmtree(first)
    return copy


def run(code: str, *args: str) -> str:
    """Run Python in a process of its own, outside the repository, in which nothing of arclm is imported yet."""
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_auto_class_opens_it_by_remote_code_and_it_comes_back_from_a_second_save(saved, tmp_path):
    code = """
import sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
saved, again = sys.argv[1:]
assert AutoConfig.from_pretrained(saved, trust_remote_code=True).model_type == "arclm"
model = AutoModel.from_pretrained(saved, trust_remote_code=True, dtype="auto")
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert "arclm.modeling_arclm" not in sys.modules
model.save_pretrained(again)
other = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, dtype="auto")
assert type(other).__name__ == "ArcLMForDiffusionLM"
assert other.lm_head.weight is other.model.embed_tokens.weight
for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
    kept = name.endswith(("A_log", "linear_attn.norm.weight"))
    assert a.dtype == b.dtype == (torch.float32 if kept else torch.bfloat16), name
    assert torch.equal(a, b), name
x = torch.arange(2, 23)[None]
assert torch.equal(model(x).logits, other(x).logits)
print(model.generate(x, max_new_tokens=4, do_sample=False).shape[0])
"""
    assert run(code, str(saved), str(tmp_path / "again")).split() == ["1"]
    files = {path.name: path.read_bytes() for path in saved.glob("*.py")}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "again").glob("*.py")}
    assert files == {name: (ROOT / name).read_bytes() for name in files}
    assert "modeling_arclm.py" in files
    with safe_open(tmp_path / "again" / "model.safetensors", framework="pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 (it is no dict)


def test_device_map_and_float32(saved):
    pytest.importorskip("accelerate")
    model = AutoModel.from_pretrained(saved, trust_remote_code=True, device_map="cpu", dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.generate(tokens(1, 5), max_new_tokens=3, do_sample=False).shape[1] <= 8


def test_layers_on_several_devices_give_the_same_logits(saved):
    accelerate = pytest.importorskip("accelerate")
    model = AutoModel.from_pretrained(saved, trust_remote_code=True, dtype=torch.float32)
    x = tokens(1, 37)
    expected = model(x, noisy_input_ids=x).logits
    # offloaded layers exercise the hooks that move inputs from device to device
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(model(x, noisy_input_ids=x).logits, expected)


def test_it_opens_without_triton_and_without_the_package(saved):
    code = """
import sys
sys.modules["triton"] = sys.modules["arclm"] = None  # importing either fails
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
x = torch.arange(2, 9)[None]
model(x, noisy_input_ids=x, labels=x).loss.backward()
model.generate(x, max_new_tokens=3)
print(type(model).__name__)
"""
    assert run(code, str(saved)).strip() == "ArcLMForDiffusionLM"


def test_a_careful_user_needs_no_remote_code(saved):
    code = """
import sys
import arclm.modeling_arclm
from transformers import AutoModel, AutoModelForCausalLM
for auto in (AutoModel, AutoModelForCausalLM):
    print(type(auto.from_pretrained(sys.argv[1])).__module__)
"""
    assert run(code, str(saved)).split() == ["arclm.modeling_arclm"] * 2


def test_downloaded_code_does_not_register_itself(saved):
    code = """
import sys
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
try:
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    print("trust_remote_code" in str(error))
"""
    assert run(code, str(saved)).strip() == "True"


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    """Loading the parent would otherwise give random weights and a warning."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    state = {f"model.language_model.{name.removeprefix('model.')}": t for name, t in model.state_dict().items()}
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \d+ weights of ArcLMForDiffusionLM.*convert_a2d\.py"):
        AutoModel.from_pretrained(tmp_path, trust_remote_code=True)


def test_output_loading_info_still_works(saved):
    model, info = AutoModel.from_pretrained(saved, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert type(model).__name__ == "ArcLMForDiffusionLM"


def test_the_server_of_transformers_is_told_to_call_generate():
    assert not hasattr(tiny_model(), "init_continuous_batching")
