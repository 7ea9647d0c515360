"""Options of train_bd3lm.py: the model card's run and what the hardware has are the defaults."""

import os
import shlex
import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from arclm.data_bd3lm import InputError


logger = logging.get_logger(__name__)

# The model card's run, where it differs from transformers' defaults (AdamW and a learning rate of 5e-5 do not).
CARD_RUN = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "num_train_epochs": 10,
    "warmup_steps": 200,
    "max_grad_norm": 0.5,
    "gradient_checkpointing": True,
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 10,
    "include_num_input_tokens_seen": True,  # tokens per second
    "logging_nan_inf_filter": False,  # `StopBeforeNaN` looks first
    "save_steps": 500,
    "save_total_limit": 1,  # the one before goes when the new one is whole
    "remove_unused_columns": False,  # `collate` takes what it needs
    "use_cache": True,  # stays in config.json; training uses none
    "output_dir": "arclm-0.8b-trained",  # beside model_name_or_path
}
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_rows": 0,
    "lora_rank": 0,
    "answer_steps": 0,
}
# Options of TrainingArguments that would spoil a run.
REFUSED = {
    "fp16": "float16 is too narrow for the states of this model",
    "remove_unused_columns": "it would remove what the batches are made of",
    "use_liger_kernel": "its kernels do not know this model, which has its own",
}


@dataclass
class DataArguments:
    """What to train, on what."""

    model_name_or_path: str = HfArg(
        default="arclm-0.8b", help="Model that convert_a2d.py made: a directory or a Hub id."
    )
    train_file: str | None = HfArg(
        default=None, help="JSONL. Rows have messages (and maybe tools, enable_thinking) or another known format."
    )
    dataset_name: str | None = HfArg(
        default=None,
        help="Hub dataset, or its directory, with such rows. Without it and train_file: the card's mixture.",
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of dataset_name, where it has several.")
    dataset_split: str = HfArg(default="train", help="Split of dataset_name, or a slice such as train[:5000].")
    eval_file: str | None = HfArg(default=None, help="JSONL to measure at the end, and when eval_strategy says.")
    eval_rows: int = HfArg(default=0, help="In place of eval_file, how many rows of every data set to keep for that.")
    max_length: int = HfArg(default=2048, help="Tokens after which a sample is cut, at least a block.")
    noise_schedule: Literal["linear", "cosine", "clipped"] = HfArg(
        default="linear",
        help="Which masking rates are drawn: all alike, light ones more often, or those in [0.3, 0.8] alone, for "
        "blocks of about 16; there the training loss is no NELBO. Held-out figures are always linear.",
    )
    ar_loss_weight: float = HfArg(
        default=0.0,
        help="Add so many times the AR loss of the clean stream (0.5 was measured); wants a model converted with "
        "--context_attention causal.",
    )
    lora_rank: int = HfArg(default=0, help="Train a LoRA adapter of this rank on all linear layers; 0: all weights.")
    answer_steps: int = HfArg(default=500, help="Print answers to two prompts every so many steps; 0: never.")


def parse_args(argv: list[str] | None, description: str | None = None) -> tuple[DataArguments, TrainingArguments]:
    """Read the command line, `sys.argv` if `None`; an InputError says what is not understood."""
    has_gpu = torch.cuda.is_available()
    has_bf16 = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    report_to = "tensorboard" if find_spec("tensorboard") else "none"
    parser = HfArgumentParser((DataArguments, TrainingArguments), description=description, conflict_handler="resolve")
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const="true",
        help="Go on from this checkpoint; without a value, or with true, from the last whole one in output_dir.",
    )
    parser.set_defaults(**CARD_RUN, bf16=has_bf16, report_to=report_to, dataloader_pin_memory=has_gpu)
    # without it, processes of torchrun that find no GPU would each train a model of their own
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())
    # transformers 5.23 prefers activation_checkpointing, which older ones do not have
    warnings.filterwarnings("ignore", message="`gradient_checkpointing`", category=FutureWarning)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(
            f"Not understood: {' '.join(unknown)}. --help lists the options. What belongs to the model, such as the "
            "block size, is in its config.json: choose it in convert_a2d.py."
        )
    if namespace.include_num_input_tokens_seen:
        namespace.include_num_input_tokens_seen = "non_padding"  # the command line takes true and false only
    for name, reason in REFUSED.items():
        if getattr(namespace, name):
            raise InputError(f"--{name}: {reason}. Leave it out.")
    if not has_bf16:
        namespace.bf16 = False
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # a configuration of `accelerate launch` may ask for bf16
        logger.warning("There is no GPU with bfloat16: training in float32.")
    if namespace.hub_token is not None:  # where the Hub looks too, and not in the pickle that goes with a checkpoint
        os.environ["HF_TOKEN"], namespace.hub_token = namespace.hub_token, None
    for name, least in AT_LEAST.items():
        if (value := getattr(namespace, name)) < least:
            raise InputError(f"--{name} {value} is less than {least}.")
    try:
        return parser.parse_dict(vars(namespace))
    except (ValueError, ImportError) as error:  # options that exclude each other, or want a package
        raise InputError(str(error)) from error


def shown_command(argv: list[str] | None) -> str:
    """Return the command of a run, for others to repeat: without the token."""
    command = shlex.join(["python", *(sys.argv if argv is None else ["train_bd3lm.py", *argv])])
    token = os.environ.get("HF_TOKEN")
    return command.replace(token, "TOKEN") if token else command
