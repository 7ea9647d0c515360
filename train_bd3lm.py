"""Train an arcLM model with block diffusion (BD3LM) on chat data, on transformers' Trainer.

    python train_bd3lm.py                                  (the model card's run: its mixture on arclm-0.8b)
    python train_bd3lm.py --model_name_or_path DIR --train_file chats.jsonl --output_dir OUT
    python train_bd3lm.py --model_name_or_path DIR --dataset_name ORG/NAME --output_dir OUT

`data_bd3lm.py` makes one sample of every assistant turn: the chat before it, which is never masked, and the response.
`BD3LMTrainer.compute_loss` adds the noise of `noise_bd3lm.py`, `logging_bd3lm.py` shows how it goes. A run that was
killed goes on from its last checkpoint by the same command with `--resume_from_checkpoint` (`checkpoints_bd3lm.py`).
The file reads in this order: trainer, main.
"""

import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from huggingface_hub import errors
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import Sampler
from transformers import AutoModel, Trainer, TrainingArguments
from transformers import PretrainedConfig as Config
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from arclm.arguments_bd3lm import DataArguments, parse_args, shown_command
from arclm.checkpoints_bd3lm import (
    EpochSampler,
    LogBeforeSave,
    StopBeforeNaN,
    TrainingError,
    choose_checkpoint,
    find_checkpoints,
    load_model,
    original_class,
    saving,
)
from arclm.data_bd3lm import IGNORE, InputError, Rows, collate, hub_names, load_samples, print_table, read_rows
from arclm.hub_arclm import upload, write_model_card
from arclm.logging_bd3lm import ProgressBar, RateBuckets, ShowAnswers, memory_gib, write_fragment
from arclm.noise_bd3lm import NOISE_SCHEDULES, make_loss_inputs


# ---- Trainer


class BD3LMTrainer(Trainer):
    """Trainer whose loss is the NELBO per response token, just like the parent with six differences.

    1. Batches arrive with all response tokens as labels, which the parent counts as `num_items_in_batch` over
       accumulation and processes. `compute_loss` then draws the noise and leaves only masked tokens as labels.
    2. Noise is keyed by seed, optimizer step and place in that step, and the order of the rows by seed and epoch:
       batch 8 x 1 or 2 x 4, one process or two, resumed or not, the same rows get the same noise.
    3. Evaluation has fixed masks of the linear schedule, and `eval_loss` is the sum over the set / its response
       tokens, whatever the number of processes.
    4. `ar_loss_weight` times the AR loss of the clean stream is added to the loss in training.
    5. Beside the loss it logs the cross-entropy of masked tokens by masking rate, that of the clean stream, memory.
    6. It stops before a step that would make the weights NaN; of checkpoints that fail nothing is left.
    """

    def __init__(self, *args, noise_schedule: str = "linear", ar_loss_weight: float = 0.0, **kwargs):
        if noise_schedule not in NOISE_SCHEDULES:
            raise InputError(f'noise_schedule="{noise_schedule}" is unknown. Choose {" or ".join(NOISE_SCHEDULES)}.')
        super().__init__(*args, **kwargs)
        check_ar_loss(ar_loss_weight, self.model.config)
        if self.args.label_smoothing_factor:
            raise InputError("label_smoothing_factor would replace the loss and its weights: leave it out.")
        if self.args.n_gpu > 1:
            raise InputError(
                f"One process sees {self.args.n_gpu} GPUs, and would number the rows of a step wrongly. Start one for "
                f"each, torchrun --nproc_per_node {self.args.n_gpu} train_bd3lm.py, or hide the others with "
                "CUDA_VISIBLE_DEVICES=0."
            )
        if self.args.world_size > 1:  # in larger batches the rows that fill the last one would count twice
            self.args.per_device_eval_batch_size = 1
        self.noise_schedule, self.ar_loss_weight = noise_schedule, ar_loss_weight
        self.loss_name = ("loss" if noise_schedule == "clipped" else "NELBO") + (" + AR" if ar_loss_weight else "")
        self.buckets = RateBuckets()
        self.step_rows, self.step_losses = [], []  # of this process, one per micro-batch
        self.add_callback(StopBeforeNaN(self))
        self.add_callback(LogBeforeSave())

    def _get_train_sampler(self, *args, **kwargs) -> Sampler:
        """Give the parent's sampler an order that does not depend on the number of processes or on a resume."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= self.args.world_size
        return EpochSampler(sampler, self.args.seed, lambda: int(self.state.epoch or 0))

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, Tensor | int | None]:
        """Collect the micro-batches of an optimizer step and number their rows in the order of the sampler."""
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self.step_rows, self.step_losses = [batch["row"].tolist() for batch in batches], []
        for i, batch in enumerate(batches):
            # processes take batches of the sampler in turn
            first = (i * self.args.world_size + self.args.process_index) * self.args.per_device_train_batch_size
            batch["row"] = torch.arange(first, first + len(batch["row"]))
        return batches, num_items_in_batch

    def compute_loss(
        self,
        model: Model,
        inputs: dict[str, Tensor],
        *args,
        num_items_in_batch: Tensor | float | None = None,
        **kwargs,
    ) -> Any:
        """Draw the noise of a micro-batch and let the model compute its share of the loss."""
        inputs = self.add_noise(inputs, model.training)
        masking_rate = inputs.pop("masking_rate")
        if model.training:
            scale = (self.args.world_size if self.args.average_tokens_across_devices else 1) / num_items_in_batch
            self.buckets.watch(inputs["loss_weights"], inputs["labels"] != IGNORE, scale, masking_rate)
            if self.ar_loss_weight:
                self.buckets.watch(inputs["clean_loss_weights"], inputs["clean_loss_weights"] > 0, scale)
        return super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    def add_noise(self, batch: dict[str, Tensor], is_training: bool) -> dict[str, Tensor]:
        """Return what the model's forward takes for a batch of `collate`, and the masking_rate of its tokens."""
        # one key and one schedule for every evaluation, so that runs with others compare
        key = (self.args.seed, self.state.global_step) if is_training else (0, 0)
        schedule = self.noise_schedule if is_training else "linear"
        x_0, rows = batch["input_ids"], batch["row"].tolist()
        noise = make_loss_inputs(x_0, batch["labels"], self.model.config, key, rows, schedule)
        if is_training and self.ar_loss_weight:
            is_next = F.pad(batch["labels"][:, 1:] != IGNORE, (0, 1))  # the clean stream at i predicts token i + 1
            noise["clean_loss_weights"] = is_next * self.ar_loss_weight
        return {"input_ids": x_0, "attention_mask": batch["attention_mask"], **noise}

    def training_step(self, *args, **kwargs) -> Tensor:
        """Remember the losses of the step, for the case that one is not finite."""
        self.step_losses.append(super().training_step(*args, **kwargs))
        return self.step_losses[-1]

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log, beside a loss of training, cross-entropy by masking rate and of the clean stream, and memory."""
        if "loss" in logs:
            logs |= {**self.buckets.take(self), "memory_gib": memory_gib()}
        super().log(logs, *args, **kwargs)

    def checkpoint_dir(self) -> Path:
        """Return where a checkpoint of this step belongs."""
        return Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")

    def _save_checkpoint(self, *args, **kwargs) -> None:
        """Save as the parent; what could not be saved whole is removed, so the one before stays the last."""
        folder, whole = self.checkpoint_dir(), [folder.name for folder in find_checkpoints(self.args.output_dir)]
        go_on = f"{whole[-1]} is whole: make room and go on with --resume_from_checkpoint." if whole else "Make room."
        try:
            with saving(folder, go_on):
                super()._save_checkpoint(*args, **kwargs)
        except TrainingError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push as the parent, which leaves out the code of the model."""
        for file in Path(checkpoint_folder).glob("*.py"):
            shutil.copy(file, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save as the parent; gathered from FSDP2, tied weights come twice and the model has another class."""
        if state_dict and self.model.config.tie_word_embeddings:
            state_dict = {key: weight for key, weight in state_dict.items() if not key.endswith("lm_head.weight")}
        with original_class(self.model):
            super()._save(output_dir, state_dict)

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


def check_ar_loss(weight: float, config: Config) -> None:
    """Raise an InputError unless a model with this configuration can be trained with so many times the AR loss."""
    if not 0 <= weight < math.inf:
        raise InputError(f"ar_loss_weight={weight} is not a factor >= 0. Of those, 0.5 was measured.")
    if weight and config.context_attention != "causal":
        raise InputError(
            "The AR loss needs a clean stream that reads from left to right. This model has context_attention="
            f'"{config.context_attention}": convert it with --context_attention causal, or leave --ar_loss_weight out.'
        )


# ---- Main


def add_lora(model: Model, rank: int) -> PeftModel:
    """Put an adapter on all linear layers, the only weights that are trained."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


@contextmanager
def advice_on_memory(args: TrainingArguments, max_length: int, lora_rank: int) -> Iterator[None]:
    """Where the memory does not suffice, say the first three things that help, and what is done already."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        batch, total = args.per_device_train_batch_size, args.train_batch_size * args.gradient_accumulation_steps
        knobs = [  # option, what it does, whether it is done already
            (f"--per_device_train_batch_size 1 --gradient_accumulation_steps {total}", "the same result", batch == 1),
            ("--gradient_checkpointing true", "slower, the same result", args.gradient_checkpointing),
            ("--optim adamw_torch_8bit", "AdamW's state in 8 bits", lora_rank or "8bit" in args.optim),
            (f"--max_length {max_length // 2}", "which cuts longer samples", False),
            ("--lora_rank 16", "which trains an adapter alone", lora_rank),
        ]
        helps = [f"{option}, {effect}" for option, effect, is_done in knobs if not is_done][:3]
        done = [option for option, _, is_done in knobs[:2] if is_done]
        raise TrainingError(
            f"Out of memory at {batch} x {max_length} tokens. What helps, in this order: {'; '.join(helps)}."
            + (f" Done already: {', '.join(done)}." if done else "")
        ) from error


def make_trainer(**options) -> BD3LMTrainer:
    """Return the trainer; what transformers refuses, or wants a package for, becomes a sentence."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(options["args"], options["model"])  # asked for later, after the data
        return BD3LMTrainer(**options)
    except (ValueError, ImportError, errors.HTTPError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "to be installed" not in str(error):  # of wandb and others
            raise
        raise InputError(str(error)) from error


def save_result(trainer: BD3LMTrainer, data_args: DataArguments) -> None:
    """Make output_dir a whole model directory, in the dtypes of the model the run began from; of LoRA, an adapter."""
    state_dict = trainer.accelerator.get_state_dict(trainer.model)  # from all processes
    if not trainer.args.should_save:
        return
    folder, name = Path(trainer.args.output_dir), data_args.model_name_or_path
    is_adapter, has_card = isinstance(trainer.model, PeftModel), (folder / "README.md").exists()
    advice = "The last checkpoint in it has the weights." if find_checkpoints(folder) else "No file has the weights."
    with saving(folder, advice):
        if is_adapter:
            trainer.model.save_pretrained(folder, state_dict=state_dict)
        else:
            model = AutoModel.from_pretrained(name, trust_remote_code=True, dtype="auto")
            model.load_state_dict(state_dict)
            model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        if not has_card:  # peft has written a form to fill in
            write_model_card(
                folder,
                trainer.hub_model_id if trainer.args.push_to_hub else folder.resolve().name,
                name,
                block_size=trainer.model.config.block_size,
                status="It was trained with `train_bd3lm.py`: [training.md](training.md) says on what and how.",
                datasets=hub_names(data_args.train_file, data_args.dataset_name),
                is_adapter=is_adapter,
            )


def push(trainer: BD3LMTrainer) -> None:
    """Upload the finished output_dir; the parent's `push_to_hub` would first write float32 weights over it."""
    trainer._finish_current_push()
    pickled = "training_args.bin"  # which pushes on the way upload
    options = {"ignore_patterns": ["_*", "checkpoint-*", pickled], "delete_patterns": pickled}
    options |= {"commit_message": "End of training", "revision": trainer.args.hub_revision}
    upload(trainer.args.output_dir, trainer.hub_model_id, **options)


def hold_out(data: Rows, count: int) -> tuple[Rows, Rows]:
    """Split a set into the rows to train on and `count` others, evenly spaced, the same in every run."""
    total = len(data.rows)
    if not 0 < count < total:
        raise InputError(f"--eval_rows {count} is outside [1, {total - 1}]: {data.name} has {total} rows.")
    kept = {i * total // count for i in range(count)}
    parts = ([i for i in range(total) if i not in kept], sorted(kept))
    train, held_out = (data._replace(rows=data.rows.select(part)) for part in parts)
    return train, held_out._replace(name=f"{data.name}, held out")


def load_data(
    data_args: DataArguments, args: TrainingArguments, tokenizer: Tokenizer, config: Config
) -> tuple[dict[str, Dataset], list[dict[str, Any]]]:
    """Return the samples to train on and to evaluate on, and the lines of the data table."""
    samples, counts = {}, []
    # the first process reads and tokenizes, the others find its files
    with args.main_process_first(desc="reading the data"):
        source = (data_args.train_file, data_args.dataset_name, data_args.dataset_split, data_args.dataset_config)
        sets = {"train": read_rows(*source)}
        if data_args.eval_file is not None:
            if data_args.eval_rows:
                raise InputError("--eval_file and --eval_rows were given. Give one of them.")
            sets["eval"] = read_rows(data_args.eval_file)
        elif data_args.eval_rows:
            pairs = [hold_out(data, data_args.eval_rows) for data in sets["train"]]
            sets["train"], sets["eval"] = (list(part) for part in zip(*pairs, strict=True))
        for part, rows in sets.items():
            samples[part], lines = load_samples(rows, tokenizer, config, max_length=data_args.max_length)
            counts += lines
    return samples, counts


def main(argv: list[str] | None = None) -> None:
    """Load, train, evaluate, save."""
    data_args, args = parse_args(argv, __doc__)
    model, tokenizer = load_model(data_args.model_name_or_path, torch.float32)  # small updates need it
    check_ar_loss(data_args.ar_loss_weight, model.config)
    checkpoint = choose_checkpoint(args, model.config, data_args.lora_rank)
    samples, counts = load_data(data_args, args, tokenizer, model.config)
    if args.process_index == 0:
        print_table(counts)
    if data_args.lora_rank:
        model = add_lora(model, data_args.lora_rank)

    with advice_on_memory(args, data_args.max_length, data_args.lora_rank):
        trainer = make_trainer(
            model=model,
            args=args,
            train_dataset=samples["train"],
            eval_dataset=samples.get("eval"),
            processing_class=tokenizer,
            data_collator=collate,
            noise_schedule=data_args.noise_schedule,
            ar_loss_weight=data_args.ar_loss_weight,
        )
        if not args.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(ProgressBar(trainer.loss_name))
        if data_args.answer_steps:
            trainer.add_callback(ShowAnswers(samples.get("eval", samples["train"]), tokenizer, data_args.answer_steps))
        trainer.train(resume_from_checkpoint=checkpoint)
        if "eval" in samples:
            metrics = trainer.evaluate()
            trainer.log_metrics("eval", metrics)
            trainer.save_metrics("eval", metrics)
    trainer.save_state()
    save_result(trainer, data_args)
    if trainer.is_world_process_zero():
        write_fragment(trainer, counts, shown_command(argv), checkpoint)
        if args.push_to_hub:
            push(trainer)


if __name__ == "__main__":
    try:
        main()
    except (InputError, TrainingError, OSError) as error:
        sys.exit(f"train_bd3lm.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train_bd3lm.py: interrupted. With --resume_from_checkpoint it goes on from the last checkpoint.")
