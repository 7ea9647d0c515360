"""Speed and memory of a training step: arcLM against dLLM's BD3LMTrainer loss over transformers' Qwen3.5.

    python benchmarks/train_speed.py --dllm PATH

PATH is a checkout of github.com/ZHZisZZ/dllm; without it that contestant is left out. dLLM reads [x_t ; x_0] as one
sequence with a block mask, so its recurrent layers scan both streams. Both contestants have the same weights, rows,
loop (loss, backward, clip, AdamW) and precision (float32 on a CPU, bfloat16 autocast over float32 weights on a GPU);
they take turns in one process. Of dLLM only the loss of its trainer runs: its argument classes ask for an older
transformers. Writes benchmarks/results/train_speed_cpu.json (or _gpu.json) and a plot beside it.

A row is a batch of random tokens, of which the last `response` share is trained on. Tokens per second counts all of
x_0. The floor of a step is the time that large matrix products of the same precision, measured in the same rounds,
take for the operations of `model_flops`; utilisation is the floor over arcLM's time. Peak memory is that of one step
with all that it needs: weights, gradients, optimizer and activations, without the libraries. Targets are for the shape
hidden256 on a CPU, and for 2,048 tokens of the 0.8B shapes on a GPU, which come first, with gradient checkpointing, as
the card's run, and without.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace

import torch
from common import (
    MB,
    check_targets,
    count_parameters,
    default_device,
    default_dtype,
    default_output,
    draw_groups,
    interleave,
    load_dllm,
    make_arclm,
    make_parent,
    measure_limits,
    median,
    peak_memory,
    print_table,
    random_ids,
    ratio,
    start_record,
    timed,
    write_record,
)
from torch import nn
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg


TARGETS = {"s_over_dllm": 2 / 3}  # at most, for the shape hidden256 on a CPU
# at most, for the 0.8B shapes on a GPU by batch and length: twice the tokens per second, and a utilisation of 0.4
GPU_TARGETS = {(1, 2048): {"s_over_dllm": 1 / 2}, (4, 2048): {"s_over_floor": 1 / 0.4}}
DLLM_TRAINER = "dllm.core.trainers.bd3lm"
MODELS = ("arclm", "dllm")
IGNORE = -100


@dataclass
class TrainSpeedArguments:
    """What to measure."""

    dllm: str | None = HfArg(default=None, help="Directory of a dLLM checkout.")
    device: str = HfArg(default_factory=default_device, help="cpu or cuda.")
    shapes: list[str] | None = field(
        default=None, metadata={"help": "Among nano, hidden256, 0.8b. CPU: the first two; GPU: all, the last first."}
    )
    batch_sizes: list[int] | None = field(default=None, metadata={"help": "Rows per batch. CPU: 1 4; GPU: 1 4."})
    lengths: list[int] | None = field(default=None, metadata={"help": "Tokens per row. CPU: 512; GPU: 2048 512."})
    responses: list[float] | None = field(
        default=None, metadata={"help": "Shares of the tokens to train on: 1.0 0.5 by default."}
    )
    repeats: int = HfArg(default=9, help="Recorded rounds, of which the median counts.")
    output_file: str | None = HfArg(default=None, help="Result file.")


def random_rows(config, batch: int, length: int, response: float, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [batch, length]; the labels are the last `response` share of the ids, -100 before it."""
    x_0 = random_ids(config, batch, length, device)
    labels = x_0.clone()
    labels[:, : round(length * (1 - response))] = IGNORE
    return x_0, labels


def arclm_loss(model: nn.Module, x_0: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function that draws one masking rate per block, as train_bd3lm.py, and computes the loss."""
    mask_token_id, block_size = model.config.mask_token_id, model.config.block_size
    num_blocks, num_items = x_0.shape[1] // block_size, int((labels != IGNORE).sum())

    def loss() -> torch.Tensor:
        t = 1e-3 + (1 - 1e-3) * torch.rand(len(x_0), num_blocks, device=x_0.device).repeat_interleave(block_size, 1)
        is_masked = (torch.rand_like(t) < t) & (labels != IGNORE)
        return model(
            x_0,
            noisy_input_ids=x_0.masked_fill(is_masked, mask_token_id),
            labels=labels.masked_fill(~is_masked, IGNORE),
            loss_weights=1 / t,
            num_items_in_batch=num_items,
        ).loss

    return loss


def dllm_loss(
    peer: ModuleType, parent: nn.Module, config, x_0: torch.Tensor, labels: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Return a function that runs `compute_loss` of dLLM's trainer, with no more of a trainer than it asks for."""
    trainer = SimpleNamespace(
        block_size=config.block_size,
        time_epsilon=1e-3,
        loss_norm_type="token",
        loss_weight_type="scheduler",
        right_shift_logits=False,  # with it dLLM prepends a token, and the lengths would differ
        scheduler=import_module("dllm.core.schedulers").LinearAlphaScheduler(),
        processing_class=SimpleNamespace(padding_side="right", mask_token_id=config.mask_token_id),
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        meter=SimpleNamespace(update=lambda **_: None),
    )
    for name in ("_preprocess_inputs", "_postprocess_outputs", "_compute_loss_weights"):
        setattr(trainer, name, MethodType(getattr(peer.BD3LMTrainer, name), trainer))
    return lambda: peer.BD3LMTrainer.compute_loss(trainer, parent, {"input_ids": x_0, "labels": labels})


def training_step(
    model: nn.Module, loss: Callable[[], torch.Tensor], device: str, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], float]:
    """Return the training step of all contestants, which returns its loss; AdamW if no optimizer is given."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device == "cuda")
    model.train()

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def model_flops(model: nn.Module, rows: tuple[int, int, float]) -> float:
    """Return the operations that a training step on `rows` cannot do without: batch, length, response share.

    Two per weight and token forward and twice that backward, over the clean tokens and the noisy blocks that have
    loss, without the last MLP of the clean tokens, which nothing asks for under unshifted logits; the head for the
    half of the response tokens that is masked on average; and attention, where a query meets a key. What the
    recurrence computes beside its projections is left out, and so is recomputation.
    """
    config, (batch, length, response) = model.config, rows
    trained = round(length * response)
    head = config.vocab_size * config.hidden_size
    body = count_parameters(model) - head * (1 if config.tie_word_embeddings else 2)
    last_mlp = 0 if config.right_shift_logits else 3 * config.hidden_size * config.intermediate_size
    pairs = length**2 / 2 + (length**2 - (length - trained) ** 2) / 2
    per_pair = 2 * config.num_attention_heads * config.head_dim * config.layer_types.count("full_attention")
    return 6.0 * batch * (body * (length + trained) - last_mlp * length + head * trained / 2 + per_pair * pairs)


def prepare(
    name: str, shape: str | dict, rows: tuple[int, int, float], device: str, dllm: str | None, checkpointing: bool
) -> Callable[[], float]:
    """Return the training step of one contestant, "arclm" or "dllm", on `rows`: batch, length, response share."""
    model = make_arclm(shape, device, torch.float32)
    config = model.config
    x_0, labels = random_rows(config, *rows, device)
    if name == "arclm":
        loss = arclm_loss(model, x_0, labels)
    else:
        model = make_parent(model)
        model.config.use_cache = False  # as transformers' Trainer
        loss = dllm_loss(load_dllm(dllm, DLLM_TRAINER), model, config, x_0, labels)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # as transformers' Trainer
    return training_step(model, loss, device)


def measure(
    shape: str | dict,
    rows: tuple[int, int, float],
    device: str,
    dllm: str | None,
    *,
    repeats: int,
    checkpointing: bool = False,
) -> dict:
    """Time and weigh one batch of `rows`: batch, length, response share; returns a row of the table."""
    names = [name for name in MODELS if name != "dllm" or dllm is not None]
    made = shape, rows, device, dllm, checkpointing
    steps = {name: prepare(name, *made) for name in names}
    contestants = {name: lambda step=step: timed(step, device) for name, step in steps.items()}
    contestants["limits"] = measure_limits(device, default_dtype(device))
    results = interleave(contestants, repeats)
    del steps, contestants
    seconds = {name: median(results.get(name, [])) for name in MODELS}
    needed = model_flops(make_arclm(shape, "meta", torch.float32), rows) / median(results["limits"])[0]
    memory = {name: peak_memory(device, prepare, name, *made) for name in names if results[name]}
    batch, length, response = rows
    return {
        "batch": batch,
        "length": length,
        "response": response,
        "gradient_checkpointing": checkpointing,
        **{f"{name}_s": seconds[name] for name in MODELS},
        **{f"{name}_tokens_per_s": ratio(batch * length, seconds[name]) for name in MODELS},
        **{f"{name}_peak_mb": ratio(memory.get(name), MB) for name in MODELS},
        "s_over_dllm": ratio(seconds["arclm"], seconds["dllm"]),
        "peak_over_dllm": ratio(memory.get("arclm"), memory.get("dllm")),
        "s_over_floor": ratio(seconds["arclm"], needed),
        "arclm_utilisation": ratio(needed, seconds["arclm"]),
    }


def targets_of(shape: str, batch: int, length: int, device: str) -> dict[str, float]:
    """Return what the numbers of a row have to be at most."""
    if device == "cuda":
        return GPU_TARGETS.get((batch, length), {}) if shape == "0.8b" else {}
    return TARGETS if shape == "hidden256" else {}


def plot(rows: list[dict], file: Path) -> None:
    """Draw tokens per second and peak memory of every row."""
    names = [
        f"{row['shape']}\n{row['batch']} x {row['length']}\n{row['response']:.0%}"
        + ("\ncheckpointing" if row["gradient_checkpointing"] else "")
        for row in rows
    ]
    panels = {
        label: {model: [row[f"{model}_{name}"] for row in rows] for model in MODELS}
        for label, name in (("tokens per second", "tokens_per_s"), ("peak memory (MB)", "peak_mb"))
    }
    draw_groups(names, panels, "batch x length, share trained on", file)


def main() -> None:
    """Measure, print, draw, write."""
    args = HfArgumentParser(TrainSpeedArguments).parse_args_into_dataclasses()[0]
    is_gpu = args.device == "cuda"
    args.shapes = args.shapes or (["0.8b", "hidden256", "nano"] if is_gpu else ["nano", "hidden256"])
    args.lengths = args.lengths or ([2048, 512] if is_gpu else [512])
    sizes = product(args.shapes, args.lengths, args.batch_sizes or [1, 4], args.responses or [1.0, 0.5])
    record = start_record("Seconds and peak memory of a training step, medians.", args.device, dllm=args.dllm)
    record |= {"repeats": args.repeats, "targets": TARGETS, "rows": []}
    file = Path(args.output_file or default_output("train_speed", args.device))
    load_dllm(args.dllm, DLLM_TRAINER)
    for shape, length, batch, response in sizes:
        for checkpointing in (True, False) if is_gpu and shape == "0.8b" else (False,):
            rows, knobs = (batch, length, response), {"repeats": args.repeats, "checkpointing": checkpointing}
            row = measure(shape, rows, args.device, args.dllm, **knobs)
            if targets := targets_of(shape, batch, length, args.device):
                row = check_targets(row, targets)
            record["rows"].append({"shape": shape, **row})
            print(record["rows"][-1], flush=True)
            write_record(record, file)  # after every row: what is cut off loses little
    print_table("Training step: seconds, tokens per second, peak memory", record["rows"])
    plot(record["rows"], file.with_suffix(".png"))


if __name__ == "__main__":
    main()
