"""What a run of train_bd3lm.py shows: its log, its progress bar, answers on the way, curves and a card at the end.

The file reads in this order: what is measured, what is shown while it runs, what is left at the end.
"""

import resource
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import Trainer, TrainerCallback
from transformers.modelcard import extract_hyperparameters_from_trainer, make_markdown_table
from transformers.trainer_callback import ProgressCallback


NUM_BUCKETS = 5
BUCKETS = tuple(f"nll_t_{i / NUM_BUCKETS:.1f}_{(i + 1) / NUM_BUCKETS:.1f}" for i in range(NUM_BUCKETS))
CLEAN = "nll_clean"  # of the clean stream, the AR loss


# ---- What is measured


class RateBuckets:
    """Mean cross-entropy in nats: of masked tokens by the masking rate t of their block, and of the clean stream.

    The loss is linear in `loss_weights`, so its gradient with respect to the weight of a token is the cross-entropy of
    that token, times what the loss was multiplied by. The backward pass has it anyway: nothing is computed twice.
    """

    names = (*BUCKETS, CLEAN)

    def __init__(self):
        self.sums = torch.zeros(2, len(self.names))  # cross-entropy, tokens

    def watch(
        self, loss_weights: Tensor, is_target: Tensor, scale: Tensor | float, masking_rate: Tensor | None = None
    ) -> None:
        """Count the targets of a micro-batch when its backward pass comes.

        Args:
            loss_weights: [B, T] float; from here on it requires a gradient.
            is_target: [B, T] bool.
            scale: what the sum of weighted cross-entropies is multiplied by to get the loss.
            masking_rate: [B, T] float in (0, 1]; `None` for the clean stream.
        """
        if masking_rate is None:
            bucket = torch.full_like(is_target.flatten(), NUM_BUCKETS, dtype=torch.long)
        else:
            bucket = (NUM_BUCKETS * masking_rate.flatten()).long().clamp(max=NUM_BUCKETS - 1)

        def count(gradient: Tensor | None) -> None:
            if gradient is None:  # the code beside some weights does not give it
                return
            columns = torch.stack((gradient.flatten().float() / scale, is_target.flatten().float()))
            self.sums = self.sums.to(columns.device).index_add_(1, bucket, columns)

        loss_weights.requires_grad_().register_hook(count)

    def take(self, trainer: Trainer) -> dict[str, float]:
        """Return the means over all processes since the last call; without the buckets that no token fell into."""
        nll, tokens = trainer.accelerator.reduce(self.sums.to(trainer.args.device), "sum").tolist()
        self.sums.zero_()
        return {name: total / count for name, total, count in zip(self.names, nll, tokens, strict=True) if count}


def memory_gib() -> float:
    """Return the most memory this process has used so far, in GiB: of its GPU where there is one, else of the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ---- What is shown while it runs


class ProgressBar(ProgressCallback):
    """The bar of transformers, with the speed beside the time left, and a line of the log instead of a dictionary."""

    def __init__(self, loss_name: str):
        super().__init__()
        self.loss_name = loss_name

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None:
            return
        if "train_tokens_per_second" in logs:
            self.training_bar.set_postfix_str(f"{logs['train_tokens_per_second']:,.0f} tokens/s", refresh=False)
        if "loss" in logs:
            buckets = " ".join(f"{logs[name]:.2f}" if name in logs else "-" for name in BUCKETS)
            clean = f"  clean {logs[CLEAN]:.3f}" if CLEAN in logs else ""
            self.training_bar.write(
                f"step {state.global_step}  {self.loss_name} {logs['loss']:.4f}  NLL by t {buckets}{clean}  "
                f"gradient {logs.get('grad_norm', 0):.3g}  lr {logs['learning_rate']:.3g}  "
                f"{logs['memory_gib']:.1f} GiB"
            )
        elif "eval_loss" in logs:
            self.training_bar.write(f"step {state.global_step}  held-out NELBO {logs['eval_loss']:.4f}")


class ShowAnswers(TrainerCallback):
    """Prints what the model answers to the first prompts of a set every `steps` optimizer steps."""

    def __init__(self, samples: Dataset, tokenizer: Tokenizer, steps: int):
        self.tokenizer, self.steps = tokenizer, steps
        rows = samples.select(range(min(2, len(samples))))
        self.prompts = [row["input_ids"][: row["length"] - row["response_tokens"]] for row in rows]

    def on_step_end(self, args, state, control, model: Model | None = None, **kwargs):
        if state.global_step % self.steps:
            return
        was_training = model.training
        model.eval()  # no dropout; and CUDA graphs are not for models in training
        for prompt in self.prompts:
            ids = torch.tensor([prompt], device=args.device)
            # greedy, so the random numbers of the run stay as they are; in every process, which sharded weights need
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, do_sample=False
            )
            answer = self.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()
            if state.is_world_process_zero:
                question = self.tokenizer.decode(prompt, skip_special_tokens=True).strip()
                tqdm.write(f"step {state.global_step}  {question[-200:]!r} -> {answer!r}")  # prints above the bar
        model.train(was_training)


# ---- What is left at the end


def draw_curves(history: list[dict[str, Any]], loss_name: str, file: Path) -> None:
    """Draw the loss, NLL by masking rate and gradient norm over optimizer steps as a PNG."""
    figure = Figure(figsize=(12, 3.6), layout="constrained", dpi=120)
    axes = figure.subplots(1, 3)

    def curve(axis, key: str, label: str, **style) -> None:
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)

    curve(axes[0], "loss", f"training, {loss_name}")
    curve(axes[0], "eval_loss", "held out, NELBO", marker="o")
    for i, name in enumerate(BUCKETS):
        low, high = name.split("_")[2:]
        curve(axes[1], name, f"t from {low} to {high}", color=(0.1 + 0.15 * i, 0.2, 0.7 - 0.12 * i))
    curve(axes[1], CLEAN, "clean stream", color="0.5", linestyle="--")
    curve(axes[2], "grad_norm", "before clipping")
    for axis, title in zip(axes, ("loss", "NLL of tokens", "gradient norm"), strict=True):
        axis.set(title=title, xlabel="optimizer step", ylabel="" if "norm" in title else "nats per token")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
    figure.savefig(file)


def write_fragment(trainer: Trainer, counts: list[dict[str, Any]], command: str, checkpoint: str | None) -> None:
    """Write `training.md`, a fragment for a model card, and `training.png` into the directory of the run."""
    folder, history = Path(trainer.args.output_dir), trainer.state.log_history
    draw_curves(history, trainer.loss_name, folder / "training.png")
    losses = [entry for entry in history if "loss" in entry or "eval_loss" in entry]
    shown = losses[:: max(1, len(losses) // 10)] + losses[-1:]
    results = [
        {"step": entry["step"], trainer.loss_name: entry.get("loss", ""), "held out": entry.get("eval_loss", "")}
        for entry in {id(entry): entry for entry in shown}.values()
    ]
    speed = [entry["train_tokens_per_second"] for entry in history if "train_tokens_per_second" in entry]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    facts = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": f"{trainer.args.world_size} x {device}, at most {memory_gib():.1f} GiB each",
        "speed": f"{speed[-1]:,.0f} tokens per second" if speed else "not measured",
        "versions": ", ".join(
            f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "datasets")
        ),
    }
    if checkpoint is not None:
        facts["resumed"] = f"from {Path(checkpoint).name}; command and data are those since then"
    hyperparameters = extract_hyperparameters_from_trainer(trainer)
    parts = [
        "## Training",
        "Block diffusion (BD3LM) with `train_bd3lm.py` of arcLM:",
        f"```\n{command}\n```",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        "### Data",
        make_markdown_table(counts),
        "### Result",
        "Nats per response token; held out it is the NELBO.",
        make_markdown_table(results) if results else "Nothing was logged.",
        "![Curves of the run](training.png)",
        "### Settings",
        "\n".join(f"- {name}: {value}" for name, value in hyperparameters.items()),
    ]
    (folder / "training.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
