"""The kept models: whole directories that work when copied elsewhere, and the root's config.json."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files

from arclm.nano.build import BuildArguments, commands
from arclm.nano.evaluate import decodings, evaluate, render_prompt
from arclm.nano.pretrain import PretrainArguments
from arclm.nano.world import tasks_per_family


ROOT = Path(__file__).resolve().parents[1]
PARENT, MODEL = ROOT / "nano" / "arclm-nano-base", ROOT / "nano" / "arclm-nano"


def test_the_code_beside_the_weights_is_the_roots():
    modeling = ROOT / "modeling_arclm.py"
    needed = {modeling.name, *(Path(file).name for file in get_relative_import_files(modeling))}
    assert {path.name for path in MODEL.glob("*.py")} == needed
    for name in needed:
        assert (MODEL / name).read_bytes() == (ROOT / name).read_bytes(), f"{name} is old. Run `make nano-code`."


def test_the_defaults_of_the_scripts_made_the_kept_models():
    made = json.loads((PARENT / "training.json").read_text())["arguments"]
    assert made == asdict(PretrainArguments(made["output_dir"]))
    made = json.loads((MODEL / "training.json").read_text())["commands"]
    lines = [f"python {shlex.join(command)}" for command in commands(BuildArguments("nano/arclm-nano"))[0]]
    assert made == lines


def test_the_kept_models_are_small_and_safe():
    files = [path for folder in (PARENT, MODEL) for path in folder.rglob("*")]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".py"}
    for folder in (PARENT, MODEL):
        assert json.loads((folder / "training.json").read_text())["seconds"]


@pytest.mark.parametrize("decoding", ["1", "dynamic"])
def test_arclm_nano_answers_held_out_tasks_from_anywhere(decoding, tmp_path):
    copy = shutil.copytree(MODEL, tmp_path / "elsewhere")
    tokenizer = AutoTokenizer.from_pretrained(copy, trust_remote_code=True)
    model = AutoModel.from_pretrained(copy, trust_remote_code=True, dtype=torch.float32)
    tasks = tasks_per_family("test", seed=11, count=8)
    results = evaluate(model, tokenizer, tasks, **decodings(model.config.block_size)[decoding])
    assert results["all"]["accuracy"] > 0.8


def test_arclm_nano_stops_by_itself():
    tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=True)
    model = AutoModel.from_pretrained(MODEL, trust_remote_code=True, dtype=torch.float32)
    prompts = [render_prompt(tokenizer, task) for task in tasks_per_family("test", seed=12, count=2)]
    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    knobs = {"max_new_tokens": 256, "do_sample": False, "remasking_strategy": "low_confidence_dynamic"}
    answers = model.generate(**inputs, **knobs)[:, inputs["input_ids"].shape[1] :]
    assert answers.shape[1] < 128
    assert (answers == tokenizer.eos_token_id).any(-1).all()


def test_the_parent_answers_held_out_tasks_from_anywhere(tmp_path):
    copy = shutil.copytree(PARENT, tmp_path / "elsewhere")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    results = evaluate(model, tokenizer, tasks_per_family("test", seed=11, count=8))
    assert results["all"]["accuracy"] > 0.8


def readme_snippet() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]


def test_the_readme_snippet_answers(tmp_path):
    snippet = readme_snippet()
    assert len([line for line in snippet.splitlines() if line]) <= 12
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "The count is 10." in done.stdout


def test_the_roots_config_is_that_of_a_converted_0_8b():
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (24, 1024, 248320)
    assert config.layer_types == (["linear_attention"] * 3 + ["full_attention"]) * 6
    # the first row that no token of Qwen3.5 uses
    assert (config.block_size, config.mask_token_id, config.dtype) == (64, 248077, torch.bfloat16)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    assert model.num_parameters() == 752_393_024
    assert GenerationConfig.from_pretrained(ROOT).eos_token_id == [248046, 248044]
    kept = json.loads((MODEL / "config.json").read_text())
    assert json.loads((ROOT / "config.json").read_text()).keys() ^ kept.keys() <= {"mamba_ssm_dtype"}
