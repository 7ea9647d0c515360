"""Pre-train arcLM-nano's autoregressive parent, a Qwen3.5 of about two million parameters, on the generated world.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 nano/pretrain.py --output_dir nano/arclm-nano-base --steps 2400

One process per core (each with one thread) is faster than one process with several threads at this size. A plain
`python nano/pretrain.py ...` works too, with half the tokens per step. A file named
"decay" in the output directory ends a run early: the rates begin to fall, and training.json names the steps that were
taken, so that its command repeats the run.
"""

import json
import os
import platform
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import HfArgumentParser, PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from arclm.nano import fast_delta_rule
from arclm.nano.build_tokenizer import build_tokenizer
from arclm.nano.evaluate import evaluate, print_table
from arclm.nano.world import generate_tasks, tasks_per_family


WIDTHS = (48, 72, 96, 168, 216)  # few shapes to compile, all of them multiples of the chunk size


@dataclass
class PretrainArguments:
    """How to train. The defaults made the kept checkpoint."""

    output_dir: str = field(metadata={"help": "Directory to write the model, the tokenizer and training.json to."})
    steps: int = field(default=2400, metadata={"help": "Optimizer steps."})
    tokens_per_batch: int = field(
        default=2048, metadata={"help": "Tokens of one process in one step, padding included."}
    )
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak rate of AdamW (embedding, norms, gates)."})
    muon_learning_rate: float = field(
        default=2e-3, metadata={"help": "Peak rate of Muon (the matrices of the layers)."}
    )
    warmup_steps: int = field(default=50, metadata={"help": "Linear warm-up."})
    decay_steps: int = field(default=400, metadata={"help": "Steps with falling rates, at the end."})
    eval_steps: int = field(default=300, metadata={"help": "Steps between evaluations on held-out tasks."})
    eval_tasks: int = field(default=24, metadata={"help": "Held-out tasks per family in these evaluations."})
    final_tasks: int = field(default=400, metadata={"help": "Held-out tasks per family for the saved checkpoint."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights and of the tasks."})


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3_5TextConfig:
    """Make the architecture: Qwen3.5 with twice [3 x Gated DeltaNet, gated attention]."""
    return Qwen3_5TextConfig(
        # more rows than tokens, as in Qwen3.5: a mask token finds an unused one
        vocab_size=-(-(len(tokenizer) + 2) // 64) * 64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )


def encode(tokenizer: PreTrainedTokenizerFast, task) -> tuple[list[int], list[int]]:
    """Encode one task as ids and labels; only the assistant's tokens have a label other than -100."""
    row = tokenizer.apply_chat_template(
        task.messages, tools=task.tools, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = row["input_ids"], row["assistant_masks"]
    end = len(mask) - mask[::-1].index(1)  # the newline after the end token is not needed
    return ids[:end], [i if m else -100 for i, m in zip(ids[:end], mask[:end], strict=True)]


def batches(tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of fresh tasks without end, rows of about the same length together.

    Args:
        tokenizer: the world's tokenizer.
        tokens: size of a batch, padding included.
        seed: seed of the tasks.
        rank: index of this process; every process has its own tasks.

    Yields:
        input_ids and labels, both [tokens // T, T] with T from `WIDTHS`, padded on the right.
    """
    rows: dict[int, list] = {width: [] for width in WIDTHS}
    for task in generate_tasks("train", seed * 1000 + rank):
        ids, labels = encode(tokenizer, task)
        width = next(width for width in WIDTHS if width >= len(ids))
        pad = width - len(ids)
        rows[width].append((ids + [tokenizer.pad_token_id] * pad, labels + [-100] * pad))
        if len(rows[width]) == tokens // width:
            input_ids, labels = zip(*rows[width], strict=True)
            rows[width] = []
            yield torch.tensor(input_ids), torch.tensor(labels)


def make_optimizers(model: Qwen3_5ForCausalLM, args: PretrainArguments) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices inside the layers and AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n and min(p.shape) > 4]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=args.muon_learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def asked_to_finish(args: PretrainArguments) -> bool:
    """Say whether a file "decay" lies in the output directory, with one answer for all processes."""
    answer = torch.tensor(float(Path(args.output_dir, "decay").exists()))
    if dist.is_initialized():
        dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)


def rate_at(step: int, args: PretrainArguments) -> float:
    """Factor of the learning rates at a step: warm-up, plateau, linear decay to zero."""
    return min(1.0, (step + 1) / args.warmup_steps, (args.steps - step) / args.decay_steps)


def average_gradients(model: Qwen3_5ForCausalLM, count: Tensor) -> None:
    """Add the gradients of all processes up and divide by the number of labels of all of them.

    Args:
        model: its gradients are of a sum over labels.
        count: number of labels of this process.
    """
    flat = torch.cat([p.grad.flatten() for p in model.parameters()] + [count.float().view(1)])
    if dist.is_initialized():
        dist.all_reduce(flat)
    flat = flat / flat[-1]
    sizes = [p.numel() for p in model.parameters()]
    for p, grad in zip(model.parameters(), flat[:-1].split(sizes), strict=True):
        p.grad = grad.view_as(p)


def train(model: Qwen3_5ForCausalLM, tokenizer: PreTrainedTokenizerFast, args: PretrainArguments) -> int:
    """Train on fresh tasks and return the number of tokens seen by all processes."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizers = make_optimizers(model, args)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    data = batches(tokenizer, args.tokens_per_batch, args.seed, rank)
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    tokens, start = 0, time.perf_counter()
    with Progress(*columns, disable=rank > 0) as progress:
        bar = progress.add_task("pre-training", total=args.steps, note="")
        step = 0
        while step < args.steps:
            input_ids, labels = next(data)
            loss = model(input_ids=input_ids, labels=labels, num_items_in_batch=1, use_cache=False).loss
            loss.backward()
            count = (labels != -100).sum()
            average_gradients(model, count)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * rate_at(step, args)
                optimizer.step()
            model.zero_grad()
            tokens += input_ids.numel() * world_size
            note = f"loss {loss.item() / count.item():.4f}, {tokens / (time.perf_counter() - start):.0f} tokens/s"
            progress.update(bar, advance=1, note=note)
            step += 1
            if step % 20 == 0 and asked_to_finish(args):
                args.steps = min(args.steps, step + args.decay_steps)
            if rank == 0 and step % 50 == 0:
                progress.console.print(f"step {step}: {note}")
            if rank == 0 and step % args.eval_steps == 0 and step < args.steps:
                save(model, tokenizer, args.output_dir)
                print_table(measure(args.output_dir, args.seed + 1, args.eval_tasks), progress.console)
    return tokens


def save(model: Qwen3_5ForCausalLM, tokenizer: PreTrainedTokenizerFast, output_dir: str) -> None:
    """Save as bfloat16 safetensors; `A_log` and the norms of the linear attention stay float32, as in Qwen3.5-0.8B."""
    state = {
        name: tensor.float() if name.endswith(("A_log", "linear_attn.norm.weight")) else tensor.to(torch.bfloat16)
        for name, tensor in model.state_dict().items()
    }
    model.config.dtype = "bfloat16"
    model.save_pretrained(output_dir, state_dict=state)
    tokenizer.save_pretrained(output_dir)


def main() -> None:
    """Train, save, measure the saved checkpoint."""
    args = HfArgumentParser(PretrainArguments).parse_args_into_dataclasses()[0]
    torch.set_num_threads(1 if "RANK" in os.environ else os.cpu_count())
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    fast_delta_rule.install()
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = Qwen3_5ForCausalLM._from_config(make_config(tokenizer), dtype=torch.float32)
    model.generation_config.update(do_sample=False, max_new_tokens=128, pad_token_id=0)
    # two kinds of layers times the widths, more than the default limit of graphs
    torch._dynamo.config.recompile_limit = 4 * len(WIDTHS)
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    start = time.perf_counter()
    tokens = train(model, tokenizer, args)
    seconds = time.perf_counter() - start
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    save(model, tokenizer, args.output_dir)
    torch.set_num_threads(os.cpu_count())
    results = measure(args.output_dir, args.seed + 2, args.final_tasks)
    print_table(results, Console())
    processes = dist.get_world_size() if dist.is_initialized() else 1
    record = {
        # from the arguments, not from sys.argv: `steps` is the number really taken
        "command": shlex.join(
            ["torchrun", "--nproc_per_node", str(processes), "nano/pretrain.py"]
            + [part for name, value in asdict(args).items() for part in (f"--{name}", str(value))]
        ),
        "arguments": asdict(args),
        "parameters": model.num_parameters(),
        "tokens": tokens,
        "seconds": round(seconds),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "held_out": results,
    }
    Path(args.output_dir, "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measure(output_dir: str, seed: int, tasks: int) -> dict:
    """Evaluate the saved bfloat16 checkpoint on held-out tasks."""
    model = Qwen3_5ForCausalLM.from_pretrained(output_dir, dtype="auto").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output_dir)
    return evaluate(model, tokenizer, tasks_per_family("test", seed, tasks))


if __name__ == "__main__":
    main()
