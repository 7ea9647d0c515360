"""Speed of `generate`: arcLM, dLLM's BD3LMSampler over transformers' Qwen3.5, the AR parent, and the arithmetic floor.

    python benchmarks/generate_speed.py --dllm PATH

PATH is a checkout of github.com/ZHZisZZ/dllm; without it that contestant is left out. All contestants have the same
weights and get the same prompt, arcLM and dLLM the same number of denoising steps; they take turns in one process.
Writes benchmarks/results/generate_speed_cpu.json (or _gpu.json) and a plot beside it.

A row is a batch of random prompts. Seconds are those of the whole call, prompt included; a step is the time from one
denoising pass to the next, sampling included. The floor of a step is its arithmetic (2 x parameters x tokens over the
rate of matrix products) or its reading (weights, state, keys and values over the memory bandwidth), whichever takes
longer; rate and bandwidth are measured between the contestants. On a GPU every row captures anew: `captured` is how
many CUDA graphs a denoising step replays, 2 at best, `capture_s` the longest capture. Targets are for the shape
hidden256 on a CPU, and for the 0.8B shapes on a GPU at the card's setting, which come first. The first call is
measured in a process of its own, without compiled kernels of earlier ones.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from common import (
    Limits,
    cache_bytes,
    check_targets,
    count_parameters,
    default_device,
    default_dtype,
    default_output,
    draw_groups,
    floor_seconds,
    interleave,
    load_dllm,
    make_arclm,
    make_parent,
    measure_limits,
    median,
    prefill,
    print_table,
    random_ids,
    ratio,
    start_record,
    synchronise,
    timed,
    write_record,
)
from transformers import HfArgumentParser, Qwen3_5ForCausalLM
from transformers.hf_argparser import HfArg

from arclm import graphs_arclm
from arclm.generation_bd3lm import _Run
from arclm.modeling_arclm import ArcLMForDiffusionLM


# at most, for the shape hidden256 on a CPU
TARGETS = {"step_over_floor": 2.0, "step_over_dllm": 0.5, "s_over_dllm": 1.0, "s_over_ar": 1.0}
LONG = {"context": 4096, "new_tokens": 256}  # the row whose seconds have a target of their own
LONG_TARGETS = TARGETS | {"s_over_dllm": 1 / 3}
# on a GPU at the 0.8B shapes: the card's setting, by rows and tokens per step
CARD = {"context": 1024, "new_tokens": 256}
CARD_TARGETS = {
    (1, 1): {"step_over_floor": 2.0, "s_over_dllm": 0.1, "s_over_ar": 0.2, "arclm_s": 256 / 1400, "capture_s": 2.0},
    (1, 4): {"step_over_floor": 2.0, "arclm_s": 256 / 5000, "capture_s": 2.0},
    (16, 4): {"step_over_batch_1": 2.0, "capture_s": 2.0},
}
FIRST_CALL_TARGETS = {"cost_s": 60.0}  # at most, on a GPU
MODELS = ("arclm", "dllm", "ar")


@dataclass
class SpeedArguments:
    """What to measure."""

    dllm: str | None = HfArg(default=None, help="Directory of a dLLM checkout.")
    device: str = HfArg(default_factory=default_device, help="cpu or cuda.")
    shapes: list[str] | None = field(
        default=None, metadata={"help": "Among nano, hidden256, 0.8b. CPU: the first two; GPU: all, the last first."}
    )
    batch_sizes: list[int] | None = field(default=None, metadata={"help": "Rows per batch. CPU: 1 4; GPU: 1 4 16."})
    contexts: list[int] | None = field(
        default=None, metadata={"help": "Prompt tokens. CPU: 64 1024; GPU: 64 1024 8192."}
    )
    new_tokens: int = HfArg(default=64, help="Tokens to generate.")
    tokens_per_step: int = HfArg(default=4, help="Tokens that a denoising step fills.")
    long_row: bool = HfArg(default=True, help="Also 256 tokens after 4,096, batch 1, for every shape.")
    repeats: int = HfArg(default=5, help="Recorded rounds, of which the median counts.")
    output_file: str | None = HfArg(default=None, help="Result file.")


class StepClock:
    """Notes when each step of a model begins; on a GPU in its queue, so that nothing waits for it."""

    def __init__(self, model: torch.nn.Module, device: str):
        self.model, self.device, self.starts = model, device, []

    def _now(self) -> float | torch.cuda.Event:
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def run(self, generate, passes: int) -> tuple[float, float]:
        """Call `generate` and return its seconds and the median seconds of its last `passes` passes."""
        self.starts.clear()
        with self._watched():
            seconds = timed(lambda: (generate(), self.starts.append(self._now())), self.device)
        steps = [
            1e-3 * begin.elapsed_time(end) if self.device == "cuda" else end - begin
            for begin, end in pairwise(self.starts)
        ]
        return seconds, median(steps[-passes:])

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Forward passes of a parent, denoising steps of arcLM, which replays less under a hook."""

        def note(*_) -> None:
            self.starts.append(self._now())

        if isinstance(self.model, ArcLMForDiffusionLM):
            denoise = _Run.denoise
            with patch.object(_Run, "denoise", lambda run: (note(), denoise(run))[1]):
                yield
            return
        hook = self.model.register_forward_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()


class CaptureClock:
    """Stands around what records CUDA graphs: notes the seconds of each capture and counts the replays."""

    def __init__(self, capture: Callable, device: str):
        self.capture, self.device, self.seconds, self.replays = capture, device, [], 0

    def __call__(self, function: Callable) -> tuple:
        start = time.perf_counter()
        replay, outputs = self.capture(function)
        synchronise(self.device)
        self.seconds.append(time.perf_counter() - start)

        def counted() -> None:
            self.replays += 1
            replay()

        return counted, outputs


@contextmanager
def watched_captures(model: ArcLMForDiffusionLM) -> Iterator[CaptureClock | None]:
    """Have `model` capture anew, under a clock; `None` on a device without graphs."""
    device = model.device.type
    if device not in graphs_arclm.CAPTURES:
        yield None
        return
    clock = CaptureClock(graphs_arclm.CAPTURES[device](model.device), device)
    graphs_arclm._IDLE.pop(model.model, None)
    with patch.dict(graphs_arclm.CAPTURES, {device: lambda _: clock}):
        yield clock


def contestants(
    model: ArcLMForDiffusionLM, parent: Qwen3_5ForCausalLM, prompts: torch.Tensor, peer: ModuleType | None, **lengths
) -> dict[str, Any]:
    """Return what to time: a function for each contestant that returns seconds of the call and of a step.

    `lengths` are `new_tokens` and `steps`, the latter over all blocks.
    """
    new, steps, config = lengths["new_tokens"], lengths["steps"], model.config
    device = prompts.device.type
    arclm_clock, parent_clock = StepClock(model, device), StepClock(parent, device)

    def arclm():
        model.generate(prompts, max_new_tokens=new, steps=steps, do_sample=False, eos_token_id=[])

    def dllm():
        tokens = {"mask_token_id": config.mask_token_id, "pad_token_id": config.pad_token_id}
        tokenizer = SimpleNamespace(**tokens, bos_token_id=None, eos_token_id=None)
        peer.BD3LMSampler(model=parent, tokenizer=tokenizer).sample(
            list(prompts),
            max_new_tokens=new,
            block_size=config.block_size,
            steps=steps,
            temperature=0.0,
            right_shift_logits=config.right_shift_logits,
        )

    def ar():
        parent.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=False)

    runs = {"arclm": lambda: arclm_clock.run(arclm, steps), "ar": lambda: parent_clock.run(ar, new)}
    if peer is not None:
        runs["dllm"] = lambda: parent_clock.run(dllm, steps)
    return runs


def step_floor(model: ArcLMForDiffusionLM, prompts: torch.Tensor, limits: Limits) -> float:
    """Return the seconds that a denoising step after prompts [B, P] cannot beat."""
    weights = sum(weight.nbytes for weight in model.parameters())
    tokens = len(prompts) * model.config.block_size
    return floor_seconds(count_parameters(model), tokens, weights + cache_bytes(prefill(model, prompts)), limits)


def measure(
    model: ArcLMForDiffusionLM,
    parent: Qwen3_5ForCausalLM,
    prompts: torch.Tensor,
    peer: ModuleType | None = None,
    *,
    new_tokens: int,
    tokens_per_step: int,
    repeats: int,
) -> dict:
    """Time one batch of prompts [B, P], P a multiple of the block; returns a row of the table."""
    device = prompts.device.type
    steps = new_tokens // tokens_per_step
    runs = contestants(model, parent, prompts, peer, new_tokens=new_tokens, steps=steps)
    with watched_captures(model) as captures:
        results = interleave({**runs, "limits": measure_limits(device, model.dtype)}, repeats)
    captured = {}
    if captures is not None:
        captured["captured"] = captures.replays / (steps * (repeats + 1))
        captured["capture_s"] = max(captures.seconds, default=None)
    limits = Limits(*median(results["limits"]))
    seconds, step = {}, {}
    for name in MODELS:
        seconds[name], step[name] = median(results.get(name, [])) or (None, None)

    floor = step_floor(model, prompts, limits)
    return {
        "batch": len(prompts),
        "context": prompts.shape[1],
        "new": new_tokens,
        "steps": steps,
        **{f"{name}_s": seconds[name] for name in MODELS},
        "arclm_step_ms": ratio(step["arclm"], 1e-3),
        "dllm_step_ms": ratio(step["dllm"], 1e-3),
        "floor_ms": 1e3 * floor,
        "step_over_floor": ratio(step["arclm"], floor),
        "step_over_dllm": ratio(step["arclm"], step["dllm"]),
        "s_over_dllm": ratio(seconds["arclm"], seconds["dllm"]),
        "s_over_ar": ratio(seconds["arclm"], seconds["ar"]),
        **captured,
        "limits": limits._asdict(),
    }


def cases_of(shape: str, args: SpeedArguments) -> list[tuple[int, int, int, int, dict]]:
    """Return batch, context, new tokens, tokens per step and targets of all rows of one shape, the card's first."""
    has_targets = shape == "hidden256" and args.device == "cpu"
    cases = [
        (batch, context, args.new_tokens, args.tokens_per_step, TARGETS if has_targets else {})
        for context, batch in product(args.contexts, args.batch_sizes)
    ]
    if args.long_row:
        cases.append((1, *LONG.values(), args.tokens_per_step, LONG_TARGETS if has_targets else {}))
    if shape == "0.8b" and args.device == "cuda":
        card = [(batch, *CARD.values(), tokens, targets) for (batch, tokens), targets in CARD_TARGETS.items()]
        cases = card + cases
    return cases


def measure_shape(shape: str, peer: ModuleType | None, args: SpeedArguments) -> Iterator[dict]:
    """Measure the rows of one shape, one after the other."""
    model = make_arclm(shape, args.device, default_dtype(args.device))
    parent, alone = make_parent(model), {}
    for batch, *sizes, targets in cases_of(shape, args):
        context, new, tokens = sizes
        prompts = random_ids(model.config, batch, context, args.device)
        row = measure(model, parent, prompts, peer, new_tokens=new, tokens_per_step=tokens, repeats=args.repeats)
        if batch == 1:
            alone[tuple(sizes)] = row["arclm_step_ms"]
        row["step_over_batch_1"] = ratio(row["arclm_step_ms"], alone.get(tuple(sizes)))
        if targets:
            row = check_targets(row, targets)
        print({"shape": shape, **row}, flush=True)
        yield {"shape": shape, **row}


def first_call(shape: str | dict, device: str) -> dict[str, float]:
    """Return the seconds of making a model, of its first call of generate and of its second."""
    start = time.perf_counter()
    model = make_arclm(shape, device, default_dtype(device))
    prompt = random_ids(model.config, 1, 4 * model.config.block_size, device)
    knobs = {"max_new_tokens": 2 * model.config.block_size, "do_sample": False, "eos_token_id": []}
    made = time.perf_counter() - start
    first, second = (timed(lambda: model.generate(prompt, **knobs), device) for _ in range(2))
    return {"make_s": made, "first_s": first, "second_s": second}


def measure_first_call(shape: str | dict, device: str) -> dict:
    """Return what the first call costs: imports, and what it takes longer than the second; kernels compile anew."""
    start = time.perf_counter()
    with (
        TemporaryDirectory() as folder,
        patch.dict(os.environ, TRITON_CACHE_DIR=folder),
        ProcessPoolExecutor(1, get_context("spawn")) as process,
    ):
        found = process.submit(first_call, shape, device).result()
    found["import_s"] = time.perf_counter() - start - sum(found.values())
    found["cost_s"] = found["import_s"] + found["first_s"] - found["second_s"]
    return check_targets(found, FIRST_CALL_TARGETS) if device == "cuda" else found


def plot(rows: list[dict], file: Path) -> None:
    """Draw the seconds of every row."""
    names = [f"{row['shape']}\n{row['batch']} x {row['context']}\n+{row['new']}" for row in rows]
    seconds = {model: [row[f"{model}_s"] for row in rows] for model in MODELS}
    draw_groups(names, {"seconds per call of generate": seconds}, "batch x context + new tokens", file)


def main() -> None:
    """Measure, print, draw, write."""
    args = HfArgumentParser(SpeedArguments).parse_args_into_dataclasses()[0]
    is_gpu = args.device == "cuda"
    args.shapes = args.shapes or (["0.8b", "hidden256", "nano"] if is_gpu else ["nano", "hidden256"])
    args.batch_sizes = args.batch_sizes or [1, 4, *[16] * is_gpu]
    args.contexts = args.contexts or [64, 1024, *[8192] * is_gpu]
    record = start_record("Seconds of generate and of a denoising step, medians.", args.device, dllm=args.dllm)
    record |= {"repeats": args.repeats, "tokens_per_step": args.tokens_per_step}
    record |= {"targets": TARGETS, "targets_long": LONG_TARGETS | LONG}
    peer = load_dllm(args.dllm, "dllm.core.samplers.bd3lm")
    file, record["rows"] = Path(args.output_file or default_output("generate_speed", args.device)), []
    record["first_call"] = {}
    for shape in args.shapes:
        record["first_call"][shape] = measure_first_call(shape, args.device)
        for row in measure_shape(shape, peer, args):
            record["rows"].append(row)
            write_record(record, file)  # after every row: what is cut off loses little
    print_table("generate: seconds of a call, milliseconds of a denoising step", record["rows"])
    plot(record["rows"], file.with_suffix(".png"))


if __name__ == "__main__":
    main()
