"""Peak memory and time of the loss at the real vocabulary: `linear_cross_entropy` against all logits at once.

    python benchmarks/loss_memory.py

runs forward and backward of both, each in a process of its own, on 2,048 targets, hidden size 1,024 and 248,320 ids,
and writes benchmarks/results/loss_memory.json. "peak_mb" counts what comes on top of hidden states and head;
"gradient_mb" of it is the gradient of the head, which training needs either way. `--dtype bfloat16` takes an hour on a
processor without instructions for it.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import MB, RESULTS, resident, start_record, write_record
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from arclm.linear_cross_entropy import linear_cross_entropy


TARGETS, HIDDEN, VOCABULARY = 2048, 1024, 248320


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy over all logits at once, in float32 as transformers takes it (`ForCausalLMLoss`)."""
    return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), labels.flatten())


LOSSES = {"linear_cross_entropy": linear_cross_entropy, "plain": plain}


@dataclass
class LossMemoryArguments:
    """What to measure."""

    loss: str | None = HfArg(default=None, help="Measure this one here: linear_cross_entropy or plain.")
    dtype: str = HfArg(default="float32", help="Of hidden states and head: float32 or bfloat16.")
    output_file: str = HfArg(default=str(RESULTS / "loss_memory.json"), help="Result file of both.")


def measure(name: str, dtype: str = "float32") -> dict:
    """Run forward and backward once in this process, whose peak memory is counted."""
    torch.manual_seed(0)
    hidden = torch.randn(1, TARGETS, HIDDEN).to(getattr(torch, dtype)).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN) * HIDDEN**-0.5).to(hidden.dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (1, TARGETS))
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of the initialisation
    before, start = resident("VmRSS"), time.perf_counter()
    loss = LOSSES[name](hidden, weight, labels)
    loss.backward()
    return {
        "peak_mb": round((resident("VmHWM") - before) / MB),
        "gradient_mb": round(weight.grad.nbytes / MB),
        "seconds": round(time.perf_counter() - start, 1),
        "loss": round(loss.item(), 5),
    }


def ratio(rows: dict, without: str | None = None) -> float:
    """How many times more memory the plain loss takes, maybe without a part that both need."""
    plain, ours = (rows[name]["peak_mb"] - rows[name].get(without, 0) for name in ("plain", "linear_cross_entropy"))
    return plain / ours


def main() -> None:
    """Measure both in processes of their own, print, write; or one, for such a process."""
    args = HfArgumentParser(LossMemoryArguments).parse_args_into_dataclasses()[0]
    if args.loss:
        print(json.dumps(measure(args.loss, args.dtype)))
        return
    what = f"Forward and backward, {TARGETS} targets, hidden size {HIDDEN}, {VOCABULARY} ids."
    record, rows = start_record(what, "cpu") | {"dtype": args.dtype}, {}
    for name in LOSSES:
        command = [sys.executable, __file__, "--loss", name, "--dtype", args.dtype]
        rows[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        print(name, rows[name], flush=True)
    record |= {
        "losses": rows,
        "plain_over_ours": round(ratio(rows), 1),
        "plain_over_ours_without_gradient": round(ratio(rows, "gradient_mb"), 1),
    }
    write_record(record, args.output_file)


if __name__ == "__main__":
    main()
