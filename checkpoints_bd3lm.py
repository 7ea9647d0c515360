"""What lets a run of train_bd3lm.py stop at any moment and go on: whole checkpoints, and rows in the same order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Sampler
from transformers import AutoConfig, Trainer, TrainerCallback, TrainingArguments
from transformers import PretrainedConfig as Config
from transformers import PreTrainedModel as Model
from transformers.trainer_utils import sort_checkpoints

from arclm.data_bd3lm import InputError


class TrainingError(RuntimeError):
    """The run has to stop; the message says where, what is saved and what to do."""


@contextmanager
def saving(folder: Path, advice: str) -> Iterator[None]:
    """Turn what goes wrong while `folder` is written, a full disk above all, into a sentence."""
    try:
        yield
    # safetensors and torch.save have their own errors for a full disk
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise TrainingError(f"{folder} could not be written: {reason}. {advice}") from error


def find_checkpoints(output_dir: str) -> list[Path]:
    """Return the whole checkpoints in a directory, the last at the end; the state is what the Trainer writes last."""
    folders = [Path(folder) for folder in sort_checkpoints(output_dir)]
    return [folder for folder in folders if (folder / "trainer_state.json").is_file()]


def choose_checkpoint(args: TrainingArguments, config: Config) -> str | None:
    """Return the checkpoint to go on from, or None to start.

    Raises:
        InputError: there is none, it belongs to another model, or one is there that was not asked for.
    """
    given, checkpoints = args.resume_from_checkpoint, find_checkpoints(args.output_dir)
    if given is None or given.lower() == "false":
        if checkpoints:
            raise InputError(
                f"{args.output_dir} holds {checkpoints[-1].name} of an earlier run. Go on from it with "
                "--resume_from_checkpoint, or give another --output_dir."
            )
        return None
    if given.lower() != "true":
        checkpoints = [Path(given)]
    if not checkpoints or not (checkpoints[-1] / "trainer_state.json").is_file():
        raise InputError(
            f"There is no whole checkpoint to go on from in {checkpoints[-1] if checkpoints else args.output_dir}. "
            "Start from the beginning, without --resume_from_checkpoint."
        )
    if (checkpoints[-1] / "config.json").is_file():  # not beside an adapter
        trained = AutoConfig.from_pretrained(checkpoints[-1], trust_remote_code=True)
        for key in ("block_size", "mask_token_id", "context_attention", "right_shift_logits"):
            if getattr(trained, key) != getattr(config, key):
                raise InputError(
                    f"{checkpoints[-1]} was trained with {key}={getattr(trained, key)}, the model has "
                    f"{key}={getattr(config, key)}. Give the --model_name_or_path with which the run began."
                )
    return str(checkpoints[-1])


@contextmanager
def original_class(model: Model) -> Iterator[None]:
    """Undo for a while that FSDP2 gives a model a subclass, whose code would be saved beside the weights."""
    kind = type(model)
    if issubclass(kind, FSDPModule):
        model.__class__ = kind.__bases__[1]
    try:
        yield
    finally:
        model.__class__ = kind


class StopBeforeNaN(TrainerCallback):
    """Ends the run before an optimizer step whose gradient is not finite, with a checkpoint of the good weights."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer = self.trainer
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
        # the gradient is the sum over processes, so all of them stop here
        if (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).isfinite():
            return
        pairs = zip(trainer.step_rows, trainer.step_losses, strict=True)
        rows = [row for rows, loss in pairs if not loss.isfinite() for row in rows]
        where = f"the loss of rows {rows} of the training samples" if rows else "the gradient, not the loss,"
        saved = "Nothing was trained yet."
        if state.global_step:
            folder = trainer.checkpoint_dir()
            if folder not in find_checkpoints(args.output_dir):
                trainer._save_checkpoint(trainer.model_wrapped, None)
            saved = f"{folder} has the weights before it: go on from there with --resume_from_checkpoint."
        raise TrainingError(
            f"In optimizer step {state.global_step + 1} {where} is not finite. {saved} A lower --learning_rate (now "
            f"{args.learning_rate:g}) or --max_grad_norm (now {args.max_grad_norm:g}) helps most often."
        )


class EpochSampler(Sampler):
    """The order of another sampler, made a function of seed and epoch, the same in every process and when resumed."""

    def __init__(self, sampler: Sampler, seed: int, epoch: Callable[[], int]):
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        with torch.random.fork_rng(devices=[]):
            key = np.random.SeedSequence((self.seed, self.epoch()))
            torch.default_generator.manual_seed(int(key.generate_state(1)[0]))
            return iter(list(self.sampler))
