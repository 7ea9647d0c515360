"""Time and memory of `generate` after long prompts: arcLM-nano up to 32k tokens, the 0.8B shapes up to 4k.

    python benchmarks/long_context.py

generates one block after random prompts, each length in a process of its own, and writes
benchmarks/results/long_context.json. "peak": memory above the loaded model. "cache": what the cache holds, as README
says. The exponents are those of a power law fitted to the lengths, without the shortest. All weights are random:
neither time nor memory depends on them.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from common import MB, RESULTS, cache_bytes, exponent, make_arclm, random_ids, resident, start_record, write_record
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg


LENGTHS = {"nano": [2048, 4096, 8192, 16384, 32768], "0.8b": [512, 1024, 2048, 4096]}


@dataclass
class LongContextArguments:
    """What to measure."""

    model: str | None = HfArg(default=None, help="nano or 0.8b: measure this one here, at --length.")
    length: int = HfArg(default=2048, help="Tokens of the prompt.")
    output_file: str = HfArg(default=str(RESULTS / "long_context.json"), help="Result file of all measurements.")


def measure(name: str, length: int) -> dict:
    """Generate one block after `length` random tokens; in this process, whose peak memory is counted."""
    model = make_arclm(name, "cpu", torch.float32)
    ids = random_ids(model.config, 1, length, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of the initialisation
    before, start = resident("VmRSS"), time.perf_counter()
    new = model.config.block_size
    output = model.generate(
        ids, max_new_tokens=new, steps=4, do_sample=False, eos_token_id=[], return_dict_in_generate=True
    )
    peak = resident("VmHWM")
    assert output.sequences.shape == (1, length + new)
    return {
        "length": length,
        "seconds": round(time.perf_counter() - start, 2),
        "peak_mb": round((peak - before) / MB, 1),
        "cache_mb": round(cache_bytes(output.past_key_values) / MB, 3),
    }


def main() -> None:
    """Measure every length in a process of its own, print, write; or one length, for such a process."""
    args = HfArgumentParser(LongContextArguments).parse_args_into_dataclasses()[0]
    if args.model:
        print(json.dumps(measure(args.model, args.length)))
        return
    what = "One block after a random prompt, batch 1, 4 denoising steps; prefill in pieces of 2,048 tokens."
    record, models = start_record(what, "cpu"), {}
    for name, lengths in LENGTHS.items():
        rows = []
        for length in lengths:
            command = [sys.executable, __file__, "--model", name, "--length", str(length)]
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
            print(name, rows[-1], flush=True)
        lengths = lengths[1:]
        exponents = {key: exponent(lengths, [row[key] for row in rows[1:]]) for key in ("seconds", "peak_mb")}
        models[name] = {"rows": rows, "exponents": exponents}
    write_record(record | {"models": models}, args.output_file)


if __name__ == "__main__":
    main()
