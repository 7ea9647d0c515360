"""Converted models and checkpoints on disk, and what lets a run of train_bd3lm.py stop at any moment and go on."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Sampler
from transformers import AutoConfig, AutoModel, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers import PretrainedConfig as Config
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
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


def load_model(name: str, dtype: torch.dtype | str) -> tuple[Model, Tokenizer]:
    """Load a converted model and its tokenizer; an InputError says what it is instead, or why it cannot be."""
    if Path(name, "adapter_config.json").is_file():
        raise InputError(
            f"{name} is an adapter. Give the model it was trained on, or merge it into that one: "
            f'PeftModel.from_pretrained(model, "{name}").merge_and_unload().save_pretrained(DIR). Save its tokenizer '
            "there too."
        )
    try:
        model_type = AutoConfig.from_pretrained(name, trust_remote_code=True).model_type
        if model_type == "arclm":
            if Path(name).is_dir() and not Path(name, "tokenizer_config.json").is_file():
                raise ValueError(
                    "it has no tokenizer. Save that of the model it was made from there: "
                    f'AutoTokenizer.from_pretrained(MODEL, trust_remote_code=True).save_pretrained("{name}")'
                )
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
            return AutoModel.from_pretrained(name, trust_remote_code=True, dtype=dtype), tokenizer
    except OSError as error:
        raise InputError(
            f"The model {name} cannot be loaded: {str(error).splitlines()[0]} Give --model_name_or_path, or make it: "
            f"python convert_a2d.py --model_name_or_path Qwen/Qwen3.5-0.8B --output_dir {name}"
        ) from error
    except (ValueError, SafetensorError) as error:
        raise InputError(f"The model {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    raise InputError(
        f'{name} is a model of type "{model_type}", not a converted one. Convert it first: '
        f"python convert_a2d.py --model_name_or_path {name} --output_dir DIR"
    )


def find_checkpoints(output_dir: str) -> list[Path]:
    """Return the whole checkpoints in a directory, the last at the end; the state is what the Trainer writes last."""
    folders = [Path(folder) for folder in sort_checkpoints(output_dir)]
    return [folder for folder in folders if is_whole(folder)]


def is_whole(folder: Path) -> bool:
    """Return whether a checkpoint was written to its end."""
    try:
        return bool(json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def choose_checkpoint(args: TrainingArguments, config: Config, lora_rank: int) -> str | None:
    """Return the checkpoint to go on from, or None to start.

    Raises:
        InputError: there is none, it belongs to another model, or one is there that was not asked for.
    """
    given, last = args.resume_from_checkpoint, next(reversed(find_checkpoints(args.output_dir)), None)
    if given is None or given.lower() == "false":
        if last:
            raise InputError(
                f"{args.output_dir} holds {last.name} of an earlier run. Go on from it with "
                "--resume_from_checkpoint, or give another --output_dir."
            )
        return None
    chosen = last if given.lower() == "true" else Path(given)
    if chosen is None or not is_whole(chosen):
        advice = f"{last} is one." if last else "Start from the beginning, without --resume_from_checkpoint."
        raise InputError(f"There is no whole checkpoint to go on from in {chosen or args.output_dir}. {advice}")
    check_checkpoint(chosen, config, lora_rank)
    return str(chosen)


def check_checkpoint(folder: Path, config: Config, lora_rank: int) -> None:
    """Raise an InputError unless a run of a model with this configuration can go on exactly from a checkpoint."""
    if not (folder / "scheduler.pt").is_file():
        raise InputError(
            f"{folder} has weights alone, not the state of optimizer and schedule that a run goes on from: give it as "
            "--model_name_or_path of a new run, or a checkpoint of one without --save_only_model."
        )
    rank = PeftConfig.from_pretrained(folder).r if (folder / "adapter_config.json").is_file() else 0
    if rank != lora_rank:
        raise InputError(f"{folder} was trained with --lora_rank {rank}, this run has {lora_rank}. Give the same.")
    if (folder / "config.json").is_file():  # not beside an adapter
        trained = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        for key in ("block_size", "mask_token_id", "context_attention", "right_shift_logits"):
            if getattr(trained, key) != getattr(config, key):
                raise InputError(
                    f"{folder} was trained with {key}={getattr(trained, key)}, the model has "
                    f"{key}={getattr(config, key)}. Give the --model_name_or_path with which the run began."
                )


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
        advice = "Nothing was trained yet: look at these rows, and at the weights that the run began from."
        if state.global_step:
            folder, earlier = trainer.checkpoint_dir(), find_checkpoints(args.output_dir)
            if folder not in earlier:
                args.save_total_limit = None  # these weights led to NaN: an earlier checkpoint may be the better one
                trainer._save_checkpoint(trainer.model_wrapped, None)
            new = "the run anew" if isinstance(trainer.model, PeftModel) else f"with --model_name_or_path {folder}"
            advice = (
                f"{folder} has the weights before it, but to resume is to repeat the step. Begin {new}, another "
                f"--output_dir and a lower --learning_rate (now {args.learning_rate:g})."
            )
            if older := [path for path in earlier if path != folder]:
                advice += f" If that fails too, {older[-1]} is from before."
        raise TrainingError(f"In optimizer step {state.global_step + 1} {where} is not finite. {advice}")


class LogBeforeSave(TrainerCallback):
    """Logs at every checkpoint, so that a resumed run begins its next mean of losses where the first run did."""

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and args.logging_strategy != "no":
            control.should_log = True

    on_epoch_end = on_step_end


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
