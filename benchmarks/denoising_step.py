"""Where the time of a denoising step goes: a minute on a GPU, no peers (those are in generate_speed.py).

    python benchmarks/denoising_step.py

For each batch of random prompts: milliseconds of a step of `generate`, sampling included, and tokens per second of the
whole call, at one token per step; the floor; and on a GPU the milliseconds that the two captured graphs of a step take
alone, the layers and the choice, with their kernels by time. What is missing between the graphs and the step is the
host. Writes benchmarks/results/denoising_step_cpu.json (or _gpu.json).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from common import (
    Limits,
    default_device,
    default_dtype,
    default_output,
    interleave,
    make_arclm,
    measure_limits,
    median,
    print_table,
    random_ids,
    start_record,
    timed,
    write_record,
)
from generate_speed import StepClock, step_floor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from arclm import graphs_arclm
from arclm.modeling_arclm import ArcLMForDiffusionLM


REPLAYS = 20


@dataclass
class StepArguments:
    """What to measure."""

    shape: str = HfArg(default="0.8b", help="Among nano, hidden256, 0.8b.")
    device: str = HfArg(default_factory=default_device, help="cpu or cuda.")
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 16], metadata={"help": "Rows per batch."})
    context: int = HfArg(default=1024, help="Prompt tokens.")
    new_tokens: int = HfArg(default=256, help="Tokens to generate.")
    repeats: int = HfArg(default=3, help="Recorded rounds, of which the median counts.")
    output_file: str | None = HfArg(default=None, help="Result file.")


def captured(model: ArcLMForDiffusionLM, batch: int) -> dict[str, Callable[[], None]]:
    """Return what replays the two graphs of a denoising step of that many rows; nothing on a CPU."""
    found = {}
    for graphs in graphs_arclm._IDLE.get(model.model, []):
        for (rows, *_), context in graphs.contexts.items():
            if rows == batch and False in context.passes:
                found["layers"] = context.passes[False].replay
        for (rows, *_), choice in graphs.choices.items():
            if rows == batch:
                found["choice"] = choice.replay
    return found


def kernels(replay: Callable[[], None]) -> list[dict[str, Any]]:
    """Return the kernels of a replay, the longest together first: name, how many, microseconds."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        replay()
        torch.cuda.synchronize()
    count, microseconds = Counter(), Counter()
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            count[event.name[:80]] += 1
            microseconds[event.name[:80]] += event.device_time
    return [{"name": name, "count": count[name], "us": us} for name, us in microseconds.most_common()]


def measure(model: ArcLMForDiffusionLM, prompts: torch.Tensor, *, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Time `generate` on prompts [B, P], P a multiple of the block; returns a row of the table and its kernels."""
    device, clock = prompts.device.type, StepClock(model, prompts.device.type)
    knobs = {"max_new_tokens": new_tokens, "steps": new_tokens, "do_sample": False, "eos_token_id": []}
    runs = {
        "generate": lambda: clock.run(lambda: model.generate(prompts, **knobs), new_tokens),
        "limits": measure_limits(device, model.dtype),
    }
    results = interleave(runs, repeats)
    seconds, step = median(results["generate"])
    limits = Limits(*median(results["limits"]))
    floor = step_floor(model, prompts, limits)
    row = {"batch": len(prompts), "context": prompts.shape[1], "step_ms": 1e3 * step, "floor_ms": 1e3 * floor}
    row |= {"tokens_per_s": new_tokens * len(prompts) / seconds, "layers_ms": None, "choice_ms": None}
    row |= {"num_kernels": None, "kernels": {}, "limits": limits._asdict()}
    replays = captured(model, len(prompts))
    for name, replay in replays.items():
        replay()
        row[f"{name}_ms"] = 1e3 * timed(lambda replay=replay: [replay() for _ in range(REPLAYS)], device) / REPLAYS
        row["kernels"][name] = kernels(replay)
    if replays:
        row["num_kernels"] = sum(one["count"] for found in row["kernels"].values() for one in found)
    return row


def main() -> None:
    """Measure, print, write."""
    args = HfArgumentParser(StepArguments).parse_args_into_dataclasses()[0]
    record = start_record("Milliseconds of a denoising step, and of its captured parts.", args.device)
    record |= {"shape": args.shape, "repeats": args.repeats, "new_tokens": args.new_tokens, "rows": []}
    model = make_arclm(args.shape, args.device, default_dtype(args.device))
    for batch in args.batch_sizes:
        prompts = random_ids(model.config, batch, args.context, args.device)
        record["rows"].append(measure(model, prompts, new_tokens=args.new_tokens, repeats=args.repeats))
        for name, found in record["rows"][-1]["kernels"].items():
            print_table(f"{name}, {batch} rows", found[:12])
        # after every row: what is cut off loses little
        write_record(record, args.output_file or default_output("denoising_step", args.device))
    print_table("Denoising step", record["rows"])


if __name__ == "__main__":
    main()
