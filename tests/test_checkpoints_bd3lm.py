"""A run that is killed, fills the disk or the memory, or meets a NaN: what is left, what it says, how it goes on."""

import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from trainers import losses, make_inputs, make_samples, make_trainer
from transformers import AutoModel, TrainerCallback, TrainingArguments

from arclm import arguments_bd3lm
from arclm import train_bd3lm as bd3lm
from arclm.checkpoints_bd3lm import EpochSampler, TrainingError, find_checkpoints
from arclm.data_bd3lm import InputError


# the process kills itself while it writes the optimizer of its second checkpoint, after the weights
KILLED = """
import os, signal, sys, torch
from arclm import train_bd3lm
save = torch.save
def kill_or_save(content, file, *args, **kwargs):
    if "checkpoint-8" in str(file) and "optimizer" in str(file):
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, file, *args, **kwargs)
torch.save = kill_or_save
train_bd3lm.main(sys.argv[1:])
"""

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def samples(nano_tokenizer, config, tmp_path):
    return make_samples(tmp_path, config, nano_tokenizer)


def test_a_killed_run_resumes_exactly(nano_tokenizer, config, tmp_path):
    # 3 steps an epoch: the run is resumed in the middle of the second and goes on into the fourth
    argv = [*make_inputs(tmp_path, config, nano_tokenizer), "--max_steps", "11", "--save_steps", "4"]
    argv[argv.index("--gradient_accumulation_steps") + 1] = "3"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    bd3lm.main([*argv, "--output_dir", str(whole)])
    command = [sys.executable, "-c", KILLED, *argv, "--output_dir", str(killed)]
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (killed / "checkpoint-8/model.safetensors").is_file()  # and is not taken for a whole one
    assert [folder.name for folder in find_checkpoints(killed)] == ["checkpoint-4"]

    loaded = AutoModel.from_pretrained(killed / "checkpoint-4", trust_remote_code=True, dtype="auto")
    assert (loaded.config.block_size, loaded.dtype) == (8, torch.float32)
    bd3lm.main([*argv, "--output_dir", str(killed), "--resume_from_checkpoint"])
    assert losses(killed) == losses(whole)
    assert len(losses(whole)) == 11
    expected, weights = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert expected.keys() == weights.keys()
    assert all(torch.equal(expected[key], weights[key]) for key in expected)
    resumed = "- resumed: from checkpoint-4; command and data are those since then"
    assert [resumed in (folder / "training.md").read_text() for folder in (whole, killed)] == [False, True]
    # the limit of one: the last checkpoint of the run, and nothing of the broken one
    assert [folder.name for folder in killed.glob("checkpoint-*")] == ["checkpoint-11"]


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_only():
    epoch = 0
    sampler = EpochSampler(torch.utils.data.RandomSampler(range(50)), 3, lambda: epoch)
    orders = []
    for epoch in (0, 1, 0):  # noqa: B007 (the sampler reads it)
        before = torch.random.get_rng_state()
        orders.append(list(sampler))
        assert torch.equal(before, torch.random.get_rng_state())
        torch.rand(7)  # what else the run draws does not matter
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != list(EpochSampler(torch.utils.data.RandomSampler(range(50)), 4, lambda: 0))


class AtStep(TrainerCallback):
    """Calls something after an optimizer step."""

    def __init__(self, step: int, call):
        self.step, self.call = step, call

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.call()


@pytest.mark.parametrize("room", [1_000, 1.2], ids=["weights", "optimizer"])
def test_a_full_disk_leaves_the_last_good_checkpoint(config, samples, tmp_path, room):
    options = {
        "max_steps": 4,
        "save_steps": 2,
        "save_strategy": "steps",
        "save_total_limit": 1,
        "optim": "adamw_torch",
    }
    trainer = make_trainer(config, samples, tmp_path / "out", **options)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    good = tmp_path / "out/checkpoint-2"

    def fill_disk():
        # files cannot grow beyond a limit, in bytes or in sizes of the weights: the kernel refuses as on a full disk
        size = room if room > 100 else int(room * (good / "model.safetensors").stat().st_size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    trainer.add_callback(AtStep(3, fill_disk))
    try:
        with pytest.raises(
            TrainingError, match=r"checkpoint-4 could not be written: .*checkpoint-2 is whole: make room"
        ):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    AutoModel.from_pretrained(good, trust_remote_code=True)
    make_trainer(config, samples, tmp_path / "out", **options).train(resume_from_checkpoint=str(good))
    assert (tmp_path / "out/checkpoint-4/optimizer.pt").is_file()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_the_run_with_the_weights_before_it(config, samples, tmp_path, where):
    trainer = make_trainer(
        config, samples, tmp_path, max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    parameter = trainer.model.model.norm.weight
    before = {}

    def break_it():
        before.update({name: weight.detach().clone() for name, weight in trainer.model.named_parameters()})
        if where == "gradient":
            parameter.register_hook(lambda gradient: gradient * torch.nan)
        else:  # the third row of the next step, the seventh of the data
            compute, seen = trainer.compute_loss, []
            trainer.compute_loss = lambda *args, **kwargs: (
                compute(*args, **kwargs) * (torch.nan if seen.append(0) or len(seen) == 3 else 1)
            )

    trainer.add_callback(AtStep(1, break_it))
    named = r"the loss of rows \[6\] of the training samples" if where == "loss" else "the gradient, not the loss,"
    with pytest.raises(
        TrainingError,
        match=rf"step 2 {named} is not finite\. .*checkpoint-1 has the weights before it, but to resume is to repeat "
        r"the step\. Begin with --model_name_or_path .*checkpoint-1, another --output_dir and a lower --learning_rate",
    ):
        trainer.train()
    assert all(torch.equal(before[name], weight) for name, weight in trainer.model.named_parameters())
    saved = AutoModel.from_pretrained(tmp_path / "checkpoint-1", trust_remote_code=True)
    assert all(torch.equal(before[name], weight) for name, weight in saved.named_parameters())


def test_weights_that_lead_to_nan_do_not_replace_those_before(config, samples, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "per_device_train_batch_size": 1}
    trainer = make_trainer(config, samples, tmp_path, max_steps=5, **options)
    norm = trainer.model.model.norm.weight
    trainer.add_callback(AtStep(3, lambda: norm.data.mul_(1e30)))
    with pytest.raises(TrainingError, match=r"checkpoint-3 has .* If that fails too, .*checkpoint-2 is from before"):
        trainer.train()
    assert [folder.name for folder in find_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_nan_in_the_first_step_saves_nothing(config, samples, tmp_path):
    trainer = make_trainer(config, samples, tmp_path)
    trainer.model.model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(TrainingError, match=r"In optimizer step 1 .* Nothing was trained yet"):
        trainer.train()
    assert not find_checkpoints(tmp_path)


BATCH = r"--per_device_train_batch_size 1 --gradient_accumulation_steps 8, the same result"
CHECKPOINTING, LENGTH = "--gradient_checkpointing true, slower, the same result", "--max_length 32, which .*"
OPTIMIZER, LORA = "--optim adamw_torch_8bit, .*", "--lora_rank 16, .*"


@pytest.mark.parametrize(
    ("options", "helps", "done"),
    [
        ("--per_device_train_batch_size 2 --gradient_checkpointing false", (BATCH, CHECKPOINTING, OPTIMIZER), "$"),
        ("--per_device_train_batch_size 2 --optim adamw_torch_8bit", (BATCH, LENGTH, LORA), " .* true"),
        ("", (OPTIMIZER, LENGTH, LORA), " Done already: --per_device_train_batch_size 1 .*, --gradient_checkpointing"),
        ("--lora_rank 2", (LENGTH,), " Done already: --per_device_train_batch_size 1"),
    ],
)
def test_out_of_memory_names_what_helps_in_order(options, helps, done):
    data_args, args = bd3lm.parse_args(["--gradient_accumulation_steps", "4", *options.split()])
    message = rf"Out of memory at {args.train_batch_size} x 64 tokens\. What helps, in this order: "
    message += rf"{'; '.join(helps)}\.{done}"
    with pytest.raises(TrainingError, match=message), bd3lm.advice_on_memory(args, 64, data_args.lora_rank):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(RuntimeError, match="another error"), bd3lm.advice_on_memory(args, 64, 0):
        raise RuntimeError("another error")


@pytest.mark.parametrize("is_training", [True, False])
def test_out_of_memory_is_a_sentence_in_training_and_in_evaluation(
    nano_tokenizer, config, tmp_path, monkeypatch, is_training
):
    compute_loss = bd3lm.BD3LMTrainer.compute_loss

    def no_memory(self, model, *args, **kwargs):
        if model.training == is_training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return compute_loss(self, model, *args, **kwargs)

    monkeypatch.setattr(bd3lm.BD3LMTrainer, "compute_loss", no_memory)
    argv = [*make_inputs(tmp_path, config, nano_tokenizer), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(TrainingError, match="Out of memory at 1 x 64 tokens"):
        bd3lm.main([*argv, "--max_steps", "1", "--eval_rows", "2"])


def test_checkpoints_of_another_run_or_model_are_refused(nano_tokenizer, config, samples, tmp_path):
    argv = [*make_inputs(tmp_path, config, nano_tokenizer), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match=r"no whole checkpoint to go on from in .*out\. Start from the beginning"):
        bd3lm.main([*argv, "--resume_from_checkpoint", "true"])
    make_trainer(config, samples, tmp_path / "out", save_strategy="steps", save_steps=1).train()
    with pytest.raises(InputError, match=r"holds checkpoint-1 of an earlier run\. Go on .*--resume_from_checkpoint"):
        bd3lm.main(argv)
    tiny_model(**{**config.to_diff_dict(), "block_size": 4}).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"checkpoint-1 was trained with block_size=8, the model has block_size=4"):
        bd3lm.main([*argv, "--resume_from_checkpoint", str(tmp_path / "out/checkpoint-1")])
    with pytest.raises(InputError, match=r"no whole checkpoint .*checkpoint-99\. .*out/checkpoint-1 is one\."):
        bd3lm.main([*argv, "--resume_from_checkpoint", str(tmp_path / "out/checkpoint-99")])
    go_on = [*argv, "--resume_from_checkpoint"]
    with pytest.raises(InputError, match=r"was trained with --lora_rank 0, this run has 3\. Give the same"):
        bd3lm.main([*go_on, "--lora_rank", "3"])
    (tmp_path / "out/checkpoint-1/scheduler.pt").unlink()
    with pytest.raises(InputError, match=r"checkpoint-1 has weights alone, .*a checkpoint of one without --save_only"):
        bd3lm.main(go_on)
    (tmp_path / "out/checkpoint-1/trainer_state.json").write_text('{"epoch": 1.0, "log_his')
    with pytest.raises(InputError, match=r"no whole checkpoint to go on from in .*out\."):
        bd3lm.main(go_on)
    with pytest.raises(InputError, match=r"Not understood: --block_size 4\..*choose it in convert_a2d\.py"):
        bd3lm.main([*argv, "--block_size", "4"])


def test_one_process_with_two_gpus_is_refused(config, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(InputError, match=r"One process sees 2 GPUs.*torchrun --nproc_per_node 2 train_bd3lm\.py"):
        make_trainer(config, samples, tmp_path)


def test_bf16_without_such_a_gpu_is_float32_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr(arguments_bd3lm.logger, "propagate", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` does for the files of configs/
    for argv in ([], ["--bf16", "true"]):
        caplog.clear()
        assert bd3lm.parse_args(argv)[1].bf16 is False
        assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"
        assert caplog.messages.count("There is no GPU with bfloat16: training in float32.") == 1
