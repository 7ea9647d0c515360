"""Small trainers and runs of train_bd3lm.py, shared by the tests of training."""

import json
from pathlib import Path

from conftest import chat, tiny_model, write_lines
from transformers import TrainingArguments

from arclm import train_bd3lm as bd3lm
from arclm.data_bd3lm import collate, load_samples, read_rows


# answers of very different lengths: a mean of means is far from the mean
ANSWERS = [" ".join(["kato"] * count) for count in (1, 40, 2, 9, 30, 1, 3, 20)]


def make_trainer(config, samples, folder, **options) -> bd3lm.BD3LMTrainer:
    """A trainer whose single step of plain gradient descent with rate 1 leaves the gradient as the difference."""
    step = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    step |= {"train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(folder, remove_unused_columns=False, dataloader_pin_memory=False, **{**step, **options})
    model = tiny_model(**config.to_diff_dict())
    return bd3lm.BD3LMTrainer(model, args, train_dataset=samples, eval_dataset=samples, data_collator=collate)


def write_chats(folder: Path) -> str:
    """Write 8 chats with `ANSWERS`; return the file."""
    return write_lines(folder / "train.jsonl", [chat("Write.", answer) for answer in ANSWERS])


def make_samples(folder: Path, config, tokenizer) -> list[dict]:
    """The 8 chats as samples."""
    return load_samples(read_rows(write_chats(folder)), tokenizer, config, max_length=256)[0]


def make_inputs(folder: Path, config, tokenizer) -> list[str]:
    """Write a float32 model and 8 chats; return the options of a run of 4 rows a step, logged at every step."""
    tiny_model(**config.to_diff_dict()).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    options = f"--model_name_or_path {folder / 'model'} --train_file {write_chats(folder)} --max_length 64"
    options += " --learning_rate 1e-2"
    options += " --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --warmup_steps 1 --logging_steps 1"
    return [*options.split(), "--report_to", "none", "--disable_tqdm", "true", "--answer_steps", "0"]


def losses(folder: Path) -> list[float]:
    """Return the losses that a run logged."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]
