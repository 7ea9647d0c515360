"""Two processes on a CPU, by torchrun and by accelerate with the files of configs/, against one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from trainers import losses, make_inputs
from transformers import AutoModel

from arclm import train_bd3lm as bd3lm


ROOT = Path(__file__).resolve().parents[1]
TRAIN, FSDP = str(ROOT / "train_bd3lm.py"), str(ROOT / "tests" / "fsdp_on_cpu.py")

pytestmark = pytest.mark.usefixtures("datasets_cache")


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def run(command: list[str], folder: Path) -> None:
    """Run `python -m ...` with the checkout's files and a cache of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    result = subprocess.run([sys.executable, "-m", *command], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


@pytest.fixture
def argv(nano_tokenizer, config, tmp_path):
    # two rows a micro-batch: rows and processes cannot be taken for each other
    argv = [*make_inputs(tmp_path, config, nano_tokenizer), "--per_device_train_batch_size", "2"]
    return [*argv, "--gradient_accumulation_steps"]


def test_two_processes_have_the_gradients_of_one(argv, tmp_path):
    step = (
        "--max_steps 1 --optim sgd --learning_rate 1 --lr_scheduler_type constant --warmup_steps 0 --max_grad_norm 0"
    )
    one, two = tmp_path / "one", tmp_path / "two"
    # 8 rows to evaluate on: the third batch of 3 would be filled with rows that count already
    step += f" --eval_file {argv[argv.index('--train_file') + 1]} --per_device_eval_batch_size 3"
    bd3lm.main([*argv, "4", *step.split(), "--output_dir", str(one)])
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), TRAIN]
    run([*launch, *argv, "2", *step.split(), "--output_dir", str(two)], tmp_path)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    held_out = [json.loads((folder / "eval_results.json").read_text())["eval_loss"] for folder in (one, two)]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-5)
    start, expected, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "one", "two"))
    for key in start:
        torch.testing.assert_close(start[key] - weights[key], start[key] - expected[key], rtol=1e-5, atol=1e-6)
    assert max((start[key] - weights[key]).abs().max() for key in start) > 0.1


def on_cpu(config_file: str, folder: Path) -> tuple[list[str], int]:
    """Return how a file of configs/ is started with at most 2 processes on this CPU, and how many there are.

    Its bfloat16 stays: train_bd3lm.py has to turn it off by itself.
    """
    settings = yaml.safe_load((ROOT / "configs" / config_file).read_text(encoding="utf-8"))
    processes = min(2, settings["num_processes"])
    changes = {"use_cpu": True, "num_processes": processes, "num_machines": 1}
    changes["main_process_port"] = int(free_port())
    (folder / config_file).write_text(yaml.safe_dump(settings | changes))
    script = FSDP if settings["distributed_type"] == "FSDP" else TRAIN
    return ["accelerate.commands.launch", "--config_file", str(folder / config_file), script], processes


@pytest.mark.parametrize("config_file", sorted(file.name for file in (ROOT / "configs").iterdir()))
def test_every_configuration_has_the_losses_of_one_process(argv, tmp_path, config_file):
    steps, one, two = ["--max_steps", "3", "--save_steps", "2"], tmp_path / "one", tmp_path / "two"
    bd3lm.main([*argv, "4", *steps, "--output_dir", str(one)])
    launch, processes = on_cpu(config_file, tmp_path)
    run([*launch, *argv, str(4 // processes), *steps, "--output_dir", str(two)], tmp_path)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    expected, weights = (load_file(folder / "model.safetensors") for folder in (one, two))
    for key in expected:
        torch.testing.assert_close(weights[key], expected[key], rtol=1e-4, atol=1e-5)
    for folder in (two, two / "checkpoint-3"):
        assert load_file(folder / "model.safetensors").keys() == expected.keys()  # FSDP2 gathers tied weights twice
        loaded = AutoModel.from_pretrained(folder, trust_remote_code=True)
        assert (folder / "modeling_arclm.py").is_file()  # FSDP2 gives the model a class of torch
        assert torch.equal(loaded.get_parameter("model.norm.weight"), weights["model.norm.weight"])
    files = {file.name for file in (two / "checkpoint-3").iterdir()}
    assert ("pytorch_model_fsdp.bin" in files) == ("fsdp" in config_file)
    assert ("rng_state_1.pth" in files) == (processes == 2)
