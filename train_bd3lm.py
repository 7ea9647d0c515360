"""Train an arcLM model with block diffusion (BD3LM) on chat data, on transformers' Trainer.

    python train_bd3lm.py                                  (the model card's run: its mixture on arclm-0.8b)
    python train_bd3lm.py --model_name_or_path DIR --train_file chats.jsonl --output_dir OUT
    python train_bd3lm.py --model_name_or_path DIR --dataset_name ORG/NAME --output_dir OUT

`data_bd3lm.py` makes one sample of every assistant turn: the chat before it, which is never masked, and the response.
`BD3LMTrainer.compute_loss` draws the noise. The file reads in this order: noise, trainer, main.
"""

import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import LongTensor, Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments
from transformers import PretrainedConfig as Config
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from arclm.data_bd3lm import IGNORE, InputError, collate, load_samples, print_table, read_rows


logger = logging.get_logger(__name__)

T_MIN = 1e-3  # bounds the loss weight 1 / t by 1,000, as in MDLM; the share of the NELBO from t below it is left out
GOLDEN_RATIO = (5**0.5 - 1) / 2


# ---- Noise


def draw_uniforms(key: tuple[int, int], rows: list[int], num_blocks: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Draw the random numbers of a batch; those of a row depend on nothing but `key` and the number of the row.

    So neither the other rows, padding, the number of processes nor a resume changes what is masked.

    Args:
        key: seed of the run and optimizer step, both >= 0.
        rows: B numbers >= 0, each unique within the step.
        num_blocks: N, blocks of a row.
        block_size: L, tokens of a block.

    Returns:
        offset [B] in [0, 1), low-discrepancy over consecutive rows, and uniforms [B, N, 1 + L] in [0, 1): for each
        block one number that ranks it, then one for each of its tokens.
    """
    start = np.random.default_rng(key).random()
    offset = torch.tensor([(start + row * GOLDEN_RATIO) % 1.0 for row in rows])
    # row + 1: a key that ends in 0 is the same key without it
    generators = [np.random.default_rng((*key, row + 1)) for row in rows]
    uniforms = np.stack([g.random((num_blocks, 1 + block_size), dtype=np.float32) for g in generators])
    return offset, torch.from_numpy(uniforms)


def sample_t(offset: Tensor, uniforms: Tensor, has_response: Tensor) -> Tensor:
    """Draw the masking rate of every block, each by itself uniform, together stratified.

    The K blocks of a row that hold response tokens get one rate in each of K equal parts of (T_MIN, 1], in random
    order. The place inside the part is the row's offset, so rows of a single block are stratified as well.

    Args:
        offset: [B] in [0, 1).
        uniforms: [B, N] in [0, 1), ranks the blocks of a row.
        has_response: [B, N] bool, True where the block has a token that can be masked.

    Returns:
        t: [B, N] masking rates in [T_MIN, 1]; 1 for a block without response.
    """
    rank = uniforms.masked_fill(~has_response, torch.inf).argsort(-1).argsort(-1)  # [B, N], 0 to K - 1 with response
    num_parts = has_response.sum(-1, keepdim=True).clamp(min=1)
    t = 1 - (1 - T_MIN) * (rank + offset[:, None]) / num_parts
    return t.masked_fill(~has_response, 1.0)


def mask_tokens(x_0: LongTensor, t: Tensor, uniforms: Tensor, is_maskable: Tensor, mask_token_id: int) -> LongTensor:
    """Draw the noisy stream x_t from q(x_t | x_0): mask each maskable token of block n with probability t[n].

    Absorbing process with the linear schedule (BD3-LM, arXiv:2503.09573), so the masking rate is t itself.

    Args:
        x_0: [B, T] clean token ids; no maskable one equals `mask_token_id`.
        t: [B, N] masking rate of each block, in (0, 1].
        uniforms: [B, N, L] in [0, 1), one for each token; N * L = T.
        is_maskable: [B, T] bool, True for response tokens. Prompt and padding are never masked.
        mask_token_id: id that replaces a masked token.
    """
    return x_0.masked_fill((uniforms < t[..., None]).flatten(1) & is_maskable, mask_token_id)


def make_loss_inputs(
    x_0: LongTensor, labels: LongTensor, config: Config, key: tuple[int, int], rows: list[int]
) -> dict[str, Tensor]:
    """Noise a batch and weight its loss: sum(loss_weights * CE) estimates the NELBO of the response tokens.

    Takes clean token ids [B, T], T a multiple of `config.block_size`; labels [B, T], all response tokens and -100
    elsewhere; for `key` and `rows` see `draw_uniforms`. Returns what the model's forward takes, [B, T] each:
    noisy_input_ids; labels, -100 where not masked; loss_weights, 1 / t of the block.
    """
    tokens, block_size = x_0.shape[1], config.block_size
    if tokens % block_size:
        raise ValueError(
            f"x_0 has {tokens} tokens, not a multiple of block_size={block_size}. "
            f"Pad it to {-(-tokens // block_size) * block_size}."
        )
    is_response = labels != IGNORE
    offset, uniforms = (u.to(x_0.device) for u in draw_uniforms(key, rows, tokens // block_size, block_size))
    t = sample_t(offset, uniforms[..., 0], is_response.unflatten(1, (-1, block_size)).any(-1))
    x_t = mask_tokens(x_0, t, uniforms[..., 1:], is_response, config.mask_token_id)
    return {
        "noisy_input_ids": x_t,
        "labels": labels.masked_fill(x_t != config.mask_token_id, IGNORE),
        "loss_weights": (1 / t).repeat_interleave(block_size, dim=-1),
    }


# ---- Trainer


class BD3LMTrainer(Trainer):
    """Trainer whose loss is the NELBO per response token, just like the parent with three differences.

    1. Batches arrive with all response tokens as labels, which the parent counts as `num_items_in_batch` over
       accumulation and processes. `compute_loss` then draws the noise and leaves only masked tokens as labels.
    2. Noise is keyed by seed, optimizer step and place in that step: batch 8 x 1 or 2 x 4, one process or two, resumed
       or not, the same rows get the same noise.
    3. Evaluation has fixed masks, and `eval_loss` is the sum over the set / its response tokens, exact in one process.
    """

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, Tensor | int | None]:
        """Collect the micro-batches of an optimizer step and number their rows in the order of the sampler."""
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        for i, batch in enumerate(batches):
            # processes take batches of the sampler in turn
            first = (i * self.args.world_size + self.args.process_index) * self.args.per_device_train_batch_size
            batch["row"] = torch.arange(first, first + len(batch["row"]))
        return batches, num_items_in_batch

    def compute_loss(self, model: Model, inputs: dict[str, Tensor], *args, **kwargs) -> Any:
        """Draw the noise of a micro-batch and let the model compute its share of the loss."""
        # one key for every evaluation, so that runs with other seeds compare
        key = (self.args.seed, self.state.global_step) if model.training else (0, 0)
        x_0, rows = inputs["input_ids"], inputs["row"].tolist()
        noise = make_loss_inputs(x_0, inputs["labels"], self.model.config, key, rows)
        inputs = {"input_ids": x_0, "attention_mask": inputs["attention_mask"], **noise}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, eval_dataset: Dataset | None = None, *args, **kwargs) -> dict[str, float]:
        """Measure the NELBO per response token as `eval_loss`."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self._tokens_per_row = sum(dataset["response_tokens"][:]) / len(dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def prediction_step(self, model: Model, inputs: dict[str, Tensor], *_, **__) -> tuple[Tensor, None, None]:
        """Return the loss of a batch, scaled so that the parent's mean over rows is the mean over tokens."""
        num_items = len(inputs["row"]) * self._tokens_per_row
        if self.args.average_tokens_across_devices:
            num_items *= self.args.world_size  # the parent's compute_loss multiplies by it
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items)
        return loss, None, None


# ---- Main

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
    "save_strategy": "no",  # the result is always saved
    "remove_unused_columns": False,  # `collate` takes what it needs
    "use_cache": True,  # stays in config.json; training uses none
    "output_dir": "arclm-0.8b-trained",  # beside model_name_or_path
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
    dataset_split: str = HfArg(default="train", help="Split of dataset_name, or a slice such as train[:5000].")
    eval_file: str | None = HfArg(default=None, help="JSONL to measure at the end, and when eval_strategy says.")
    max_length: int = HfArg(default=2048, help="Tokens after which a sample is cut, at least a block.")


def parse_args(argv: list[str] | None) -> tuple[DataArguments, TrainingArguments]:
    """Read the command line; the card's run and what the hardware has are the defaults."""
    has_bf16 = (has_gpu := torch.cuda.is_available()) and torch.cuda.is_bf16_supported()
    report_to = "tensorboard" if find_spec("tensorboard") else "none"
    parser = HfArgumentParser((DataArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(**CARD_RUN, bf16=has_bf16, report_to=report_to, dataloader_pin_memory=has_gpu)
    # without it, processes of torchrun that find no GPU would each train a model of their own
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())
    # transformers 5.23 prefers activation_checkpointing, which older ones do not have
    warnings.filterwarnings("ignore", message="`gradient_checkpointing`", category=FutureWarning)
    data_args, args = parser.parse_args_into_dataclasses(argv)
    if not args.bf16 and not has_bf16:
        logger.warning("There is no GPU with bfloat16: training in float32.")
    return data_args, args


def load_model(name: str) -> tuple[Model, Tokenizer, dict[str, torch.dtype]]:
    """Load a converted model in float32, which small updates need, and the dtype that each of its weights came in."""
    try:
        model_type = AutoConfig.from_pretrained(name, trust_remote_code=True).model_type
    except OSError as error:
        raise InputError(
            f"The model {name} cannot be loaded: {str(error).splitlines()[0]} Give --model_name_or_path, or make it: "
            f"python convert_a2d.py --model_name_or_path Qwen/Qwen3.5-0.8B --output_dir {name}"
        ) from error
    if model_type != "arclm":
        raise InputError(
            f'{name} is a model of type "{model_type}", not a converted one. Convert it first: '
            f"python convert_a2d.py --model_name_or_path {name} --output_dir DIR"
        )
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    model = AutoModel.from_pretrained(name, trust_remote_code=True, dtype="auto")
    dtypes = {key: weight.dtype for key, weight in model.named_parameters()}
    return model.float(), tokenizer, dtypes


def save_result(trainer: BD3LMTrainer, dtypes: dict[str, torch.dtype]) -> None:
    """Make output_dir a whole model directory, its weights in the dtypes that they came in."""
    for key, weight in trainer.model.named_parameters():
        weight.data = weight.data.to(dtypes[key])
    trainer.save_model()
    if trainer.args.should_save:
        # a pickle has no place in a model directory
        Path(trainer.args.output_dir, "training_args.bin").unlink(missing_ok=True)


def load_data(
    data_args: DataArguments, args: TrainingArguments, tokenizer: Tokenizer, config: Config
) -> tuple[dict[str, Dataset], list[dict[str, Any]]]:
    """Return the samples to train on and to evaluate on, and the lines of the data table."""
    samples, counts = {}, []
    # the first process reads and tokenizes, the others find its files
    with args.main_process_first(desc="reading the data"):
        sets = {"train": read_rows(data_args.train_file, data_args.dataset_name, data_args.dataset_split)}
        if data_args.eval_file is not None:
            sets["eval"] = read_rows(data_args.eval_file, None, "")
        for part, rows in sets.items():
            samples[part], lines = load_samples(rows, tokenizer, config, max_length=data_args.max_length)
            counts += lines
    return samples, counts


def main(argv: list[str] | None = None) -> None:
    """Load, train, evaluate, save."""
    data_args, args = parse_args(argv)
    model, tokenizer, dtypes = load_model(data_args.model_name_or_path)
    samples, counts = load_data(data_args, args, tokenizer, model.config)
    if args.process_index == 0:
        print_table(counts)

    trainer = BD3LMTrainer(
        model=model,
        args=args,
        train_dataset=samples["train"],
        eval_dataset=samples.get("eval"),
        processing_class=tokenizer,
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if "eval" in samples:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    save_result(trainer, dtypes)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"train_bd3lm.py: {error}")
