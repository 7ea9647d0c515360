"""What the speed benchmarks share: shapes and models, clocks, the limits of the machine, tables and result files.

All weights that it makes are random: no time or memory depends on them.
"""

import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from arclm.cache_arclm import ArcLMCache
from arclm.configuration_arclm import ArcLMConfig
from arclm.generation_bd3lm import PREFILL_TOKENS
from arclm.modeling_arclm import ArcLMForDiffusionLM


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MB = 10**6

# Between arcLM-nano and the 0.8B model: 7.8 million parameters.
HIDDEN_256 = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
    "block_size": 64,
    "mask_token_id": 2047,
    "pad_token_id": 2046,
}
SHAPES = {"nano": ROOT / "nano" / "arclm-nano", "hidden256": HIDDEN_256, "0.8b": ROOT}
# fields that arcLM's configuration has and its parent's has not, or that would end a text early
NOT_PARENT = {"block_size", "mask_token_id", "context_attention", "right_shift_logits", "eos_token_id"}
NOT_PARENT |= {"auto_map", "architectures", "model_type", "transformers_version", "dtype"}


# ---- Models


def make_config(shape: str | dict) -> ArcLMConfig:
    """Return the configuration of a name in `SHAPES`, or of fields, with room for any context measured here."""
    if isinstance(shape, str) and shape not in SHAPES:
        raise SystemExit(f"The shape {shape!r} is unknown. Choose among {', '.join(SHAPES)}.")
    source = SHAPES[shape] if isinstance(shape, str) else shape
    config = ArcLMConfig(**source) if isinstance(source, dict) else ArcLMConfig.from_pretrained(source)
    config.max_position_embeddings = 2**18  # no weight depends on it
    return config


def make_arclm(shape: str | dict, device: str, dtype: torch.dtype) -> ArcLMForDiffusionLM:
    """Return an arcLM model with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        return ArcLMForDiffusionLM(make_config(shape)).to(dtype).eval()


def make_parent(model: ArcLMForDiffusionLM) -> Qwen3_5ForCausalLM:
    """Return transformers' Qwen3.5 over the very weights of `model`, which takes no more memory."""
    fields = {name: value for name, value in model.config.to_dict().items() if name not in NOT_PARENT}
    with torch.device("meta"):
        parent = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**fields))
    parent.load_state_dict(model.state_dict(), assign=True)
    parent.tie_weights()
    # the one buffer that no checkpoint holds
    parent.model.rotary_emb = type(parent.model.rotary_emb)(parent.config).to(model.device)
    return parent.eval()


def random_ids(config: ArcLMConfig, batch: int, tokens: int, device: str, seed: int = 0) -> torch.Tensor:
    """[batch, tokens] ids, no mask, padding or end token among them."""
    usable = torch.ones(config.vocab_size, dtype=torch.bool)
    usable[[id for id in (config.mask_token_id, config.pad_token_id, config.eos_token_id) if id is not None]] = False
    usable = usable.nonzero().squeeze(1)
    index = torch.randint(len(usable), (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return usable[index].to(device)


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights, tied ones once: a token is multiplied with each of them once."""
    return sum(weight.numel() for weight in model.parameters())


def cache_bytes(cache: ArcLMCache) -> int:
    """Return what a denoising step reads of the cache: keys, values and states."""
    tensors = [*cache.keys, *cache.values, *cache.conv_states, *cache.recurrent_states]
    return sum(x.nbytes for x in tensors if x is not None)


@torch.no_grad()
def prefill(model: nn.Module, ids: torch.Tensor, block_size: int | None = None) -> ArcLMCache:
    """Commit ids [B, T] in pieces, as `generate` does."""
    cache = None
    for piece in ids.split(PREFILL_TOKENS, 1):
        cache = model(
            piece, past_key_values=cache, use_cache=True, block_size=block_size, logits_to_keep=1
        ).past_key_values
    return cache


def load_dllm(checkout: str | None, module: str) -> ModuleType | None:
    """Import one module of a dLLM checkout; without a checkout say in one sentence what is left out.

    The package's own `__init__` files, its argument classes and its metrics ask for packages and for versions of
    transformers that its sampler and its loss do not need: stand-ins take their place.
    """
    if checkout is None:
        print("dLLM is left out: give the directory of a checkout of github.com/ZHZisZZ/dllm with --dllm.")
        return None
    if not Path(checkout, "dllm", "core").is_dir():
        raise SystemExit(f"{checkout} is no checkout of dLLM: dllm/core is not there.")
    for name in ("dllm", "dllm.core", "dllm.utils"):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(Path(checkout, *name.split(".")))]
    for name in ("dllm.utils.configs", "dllm.utils.data", "dllm.core.trainers.utils"):
        stand_in = sys.modules[name] = ModuleType(name)
        stand_in.__getattr__ = lambda attribute: type(attribute, (), {})
    return import_module(module)


# ---- Clocks


def synchronise(device: str) -> None:
    """Wait for what a GPU still has to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], Any], device: str) -> float:
    """Return the seconds that a call takes."""
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def interleave(contestants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list]:
    """Call all contestants in turn, A B C A B C ..., so that what else the machine does meets all of them.

    Returns what each call returned, `repeats` items per contestant after one unrecorded call. A contestant that does
    not fit into the memory of the GPU has no items.
    """
    results = {name: [] for name in contestants}
    running = dict(contestants)
    for repeat in range(repeats + 1):
        for name, run in tuple(running.items()):
            try:
                result = run()
            except torch.OutOfMemoryError:
                del running[name]
                results[name] = []
                torch.cuda.empty_cache()
                continue
            if repeat:
                results[name].append(result)
    return results


def median(values: list) -> Any:
    """Return the median of numbers, or of each place of equally long tuples; `None` where nothing was measured."""
    return np.median(np.array(values), axis=0).tolist() if values else None


def ratio(value: float | None, other: float | None) -> float | None:
    """Return value / other, `None` where one was not measured."""
    return None if value is None or other is None else value / other


# ---- Limits of the machine


class Limits(NamedTuple):
    """What the machine can do at most.

    Fields:
        flops: multiplications and additions per second in matrix products of the dtype measured.
        bandwidth: bytes per second read from memory.
    """

    flops: float
    bandwidth: float


def measure_limits(device: str, dtype: torch.dtype) -> Callable[[], tuple[float, float]]:
    """Return a contestant for `interleave` that measures the `Limits`: matrix products, and a sum over much memory."""
    size, numbers = (8192, 2**28) if device == "cuda" else (1024, 2**25)
    a, x = torch.randn(size, size, device=device, dtype=dtype), torch.ones(numbers, device=device)

    @torch.no_grad()
    def run() -> tuple[float, float]:
        # the first product of a call meets caches full of the contestants before it
        product = min(timed(lambda: a @ a, device) for _ in range(3))
        return 2 * size**3 / product, x.nbytes / timed(x.sum, device)

    return run


def floor_seconds(parameters: int, tokens: int, bytes_read: int, limits: Limits) -> float:
    """Return the time that a pass over `tokens` cannot beat: its arithmetic, or reading its weights and context."""
    return max(2 * parameters * tokens / limits.flops, bytes_read / limits.bandwidth)


def exponent(x: list[float], y: list[float]) -> float:
    """Return b of the power law y = a x^b, fitted by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


# ---- Memory


def peak_memory(device: str, prepare: Callable[..., Callable[[], Any]], *args) -> int:
    """Return the bytes held at most while the function that `prepare(*args)` returns runs for the second time.

    What it was prepared with is counted, what preparing took meanwhile is not. On a CPU the operating system counts,
    in a process of its own, since freed memory that a process keeps would hide what comes after it: `prepare` has to
    be a function of a module.
    """
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        run = prepare(*args)
        run()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(peak_resident, torch.get_num_threads(), prepare, *args).result()


def peak_resident(threads: int, prepare: Callable[..., Callable[[], Any]], *args) -> int:
    """Do in this process what `peak_memory` does on a CPU, with so many threads. Linux only."""
    torch.set_num_threads(threads)
    prepare(*args)()  # whatever is imported or started on first use is not counted
    give_back_memory()
    before = resident("VmRSS")
    run = prepare(*args)
    run()
    give_back_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    run()
    return resident("VmHWM") - before


def give_back_memory() -> None:
    """Return freed memory to the operating system, which would count it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident(field: str) -> int:
    """Return bytes of resident memory of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


# ---- Results


def default_device() -> str:
    """Return cuda where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> torch.dtype:
    """Return what models run in: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def hardware(device: str) -> dict:
    """Return what the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    found = {
        "cpu": (re.findall(r"model name\s*: (.*)", text) or [platform.machine()])[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "load_average_at_start": round(os.getloadavg()[0], 1),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1)}
    return found


def versions(dllm: str | None = None, packages: tuple[str, ...] = ()) -> dict:
    """Return versions of what was measured, those of further packages and the commit of a dLLM checkout among them."""
    names = ("torch", "transformers", *packages)
    found = {"python": platform.python_version()} | {name: version(name) for name in names}
    if torch.cuda.is_available():  # what compiles the kernels, and what transformers takes for its own
        for name in ("triton", "flash-linear-attention"):
            with suppress(PackageNotFoundError):
                found[name] = version(name)
    if dllm is not None:
        # the first line is where the directory is in its repository: at the top, or the commit is another project's
        command = ["git", "-C", dllm, "rev-parse", "--show-prefix", "HEAD"]
        prefix, _, commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")
        found["dllm"] = "unknown" if prefix else commit.strip() or "unknown"
    return found


def start_record(
    what: str, device: str, *, seed: int = 0, dllm: str | None = None, packages: tuple[str, ...] = ()
) -> dict:
    """Return the head of a result file."""
    dtype = str(default_dtype(device)).removeprefix("torch.")
    found = versions(dllm, packages)
    return {"what": what, "hardware": hardware(device), "dtype": dtype, "versions": found, "seed": seed}


def default_output(name: str, device: str) -> Path:
    """Return where the results of a benchmark go: one file for CPUs, one for GPUs."""
    return RESULTS / f"{name}_{'gpu' if device == 'cuda' else 'cpu'}.json"


def write_record(record: dict, file: str | Path) -> None:
    """Write a result file, numbers with four digits."""

    def rounded(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: rounded(value) for key, value in x.items()}
        if isinstance(x, list | tuple):
            return [rounded(value) for value in x]
        return float(f"{x:.4g}") if isinstance(x, float) else x

    Path(file).write_text(json.dumps(rounded(record), indent=2) + "\n", encoding="utf-8")
    print(f"Wrote {file}")


def draw_groups(names: list[str], panels: dict[str, dict[str, list]], title: str, file: Path) -> None:
    """Draw side by side, for each label of the vertical axis, one group of bars per name, one bar per contestant."""
    size = (len(panels) * max(4.5, 0.8 * len(names)), 4.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (label, contestants) in zip(axes[0], panels.items(), strict=True):
        width = 0.8 / len(contestants)
        for i, (contestant, values) in enumerate(contestants.items()):
            left = (i - (len(contestants) - 1) / 2) * width
            heights = [float("nan") if value is None else value for value in values]
            axis.bar([x + left for x in range(len(names))], heights, 0.93 * width, label=contestant)
        axis.set(ylabel=label, yscale="log", title=title)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.legend()
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def check_targets(row: dict, targets: dict[str, float]) -> dict:
    """Add to a row, for each ratio that was measured, its target and whether it is met: at most so much."""
    measured = {name: most for name, most in targets.items() if row.get(name) is not None}
    return {**row, "targets": {name: {"at_most": most, "met": row[name] <= most} for name, most in measured.items()}}


def print_table(title: str, rows: list[dict]) -> None:
    """Print the plain values of rows, one line each; behind one with a target stands what it has to be at most."""
    columns = [name for name in rows[0] if not isinstance(rows[0][name], dict)]
    table = Table(*columns, title=title)
    for row in rows:
        cells = []
        for name in columns:
            value, target = row[name], row.get("targets", {}).get(name)
            cell = "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
            if target is not None:
                cell += f" {'yes' if target['met'] else 'NO'} (<= {target['at_most']:.2g})"
            cells.append(cell)
        table.add_row(*cells)
    Console(width=170).print(table)
