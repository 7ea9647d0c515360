"""Time and peak memory of convert_a2d.py at the shapes of Qwen3.5-0.8B.

    python benchmarks/convert_0_8b.py

makes a checkpoint with Qwen3.5-0.8B's names, shapes and dtypes (random weights, with vision tower and
multi-token-prediction head, in several shards), converts it without and with verification, each in its own process,
and writes benchmarks/results/convert_0_8b.json. Needs 5 GB of disk and 6 GB of memory.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


# torch is imported by the children only: the kernel counts this process's memory as part of each child's peak
ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT.parent / "shared" / "data" / "tokenizer_qwen3_5_like"
NUM_SHARDS = 4
MB = 10**6

TEXT_CONFIG = {
    "vocab_size": 248320,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "full_attention_interval": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "mtp_num_hidden_layers": 1,
    "mamba_ssm_dtype": "float32",
    "eos_token_id": 248044,
    "dtype": "bfloat16",
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
    },
}
VISION_CONFIG = {"depth": 12, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072, "out_hidden_size": 1024}


def shapes() -> dict[str, list[int]]:
    """Return name and shape of every tensor: those of transformers' model, and the head that it leaves out."""
    import torch
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    config = Qwen3_5Config(text_config=TEXT_CONFIG, vision_config=VISION_CONFIG, tie_word_embeddings=True)
    with torch.device("meta"):
        model = Qwen3_5ForConditionalGeneration(config)
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    attention_layer = "model.language_model.layers.3."
    found |= {
        name.replace(attention_layer, "mtp.layers.0."): shape
        for name, shape in found.items()
        if name.startswith(attention_layer)
    }
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    return {**found, "mtp.fc.weight": [1024, 2048], **{f"mtp.{norm}.weight": [1024] for norm in norms}}


def random_tensor(name: str, shape: list[int]):
    """Return weights of a size that keeps activations near 1, in the dtype that Qwen3.5 stores them in."""
    import torch

    noise = torch.randn(shape)
    if name.endswith("A_log"):
        return noise
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.02 * noise
    scale = 0.3 if "conv1d" in name else 0.02
    return (scale * noise).to(torch.bfloat16)


def make_checkpoint(path: Path, tokenizer: Path) -> None:
    """Write the checkpoint."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "tie_word_embeddings": True,
        "text_config": {**TEXT_CONFIG, "model_type": "qwen3_5_text"},
        "vision_config": {**VISION_CONFIG, "model_type": "qwen3_5"},
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    names = shapes()
    files = [f"model.safetensors-{i:05}-of-{NUM_SHARDS:05}.safetensors" for i in range(1, NUM_SHARDS + 1)]
    weight_map = {name: files[i * NUM_SHARDS // len(names)] for i, name in enumerate(names)}
    for file in files:
        shard = {name: random_tensor(name, shape) for name, shape in names.items() if weight_map[name] == file}
        save_file(shard, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file in tokenizer.iterdir():
        (path / file.name).write_bytes(file.read_bytes())


def measure(command: list[str]) -> tuple[dict, str]:
    """Run a command and return its time and peak memory, and what it printed."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        output.seek(0)
        printed = output.read()
    if status:
        raise SystemExit(f"{' '.join(command)} failed.")
    to_bytes = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_mb": round(usage.ru_maxrss * to_bytes / MB),
    }, printed


def hardware() -> dict:
    """Return what the figures depend on."""
    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text() + "\nmodel name: unknown")[1]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "load_average_at_start": round(os.getloadavg()[0], 1),
    }


def benchmark(tokenizer: Path, work_dir: str | None) -> dict:
    """Make the checkpoint, convert it twice, and return the figures."""
    results = {
        "what": "convert_a2d.py on random weights in the shapes of Qwen3.5-0.8B; MB = 10^6 bytes; a run is a process "
        "from start to end, imports included, on a machine as busy as load_average_at_start says; memory counts the "
        "pages mapped from files",
        "hardware": hardware(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }
    with tempfile.TemporaryDirectory(dir=work_dir) as work:
        src, out = Path(work) / "qwen", Path(work) / "arclm"
        src.mkdir()
        maker = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(src, tokenizer))
        maker.start()
        maker.join()
        shards = sorted(file.stat().st_size for file in src.glob("*.safetensors"))
        results["source"] = {
            "shards": len(shards),
            "total_mb": round(sum(shards) / MB),
            "largest_shard_mb": round(shards[-1] / MB),
            "tokenizer_json_mb": round((src / "tokenizer.json").stat().st_size / MB, 1),
        }
        command = [sys.executable, str(ROOT / "convert_a2d.py"), "--model_name_or_path", str(src), "--output_dir"]
        results["convert"], _ = measure([*command, str(out), "--verify", "false"])
        results["convert"]["written_mb"] = round(sum(file.stat().st_size for file in out.iterdir()) / MB)
        results["convert_and_verify"], printed = measure([*command, str(out) + "-verified", "--verify", "true"])
        error, scale = re.search(r"within (\S+) at scale (\S+)\.", printed).groups()
        results["convert_and_verify"] |= {"max_logit_error": float(error), "logit_scale": float(scale)}
    return results


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="directory of a Qwen3.5 tokenizer")
    parser.add_argument("--work_dir", help="where the checkpoint lies meanwhile (default: the system's choice)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "convert_0_8b.json")
    args = parser.parse_args()
    if not (args.tokenizer / "tokenizer.json").is_file():
        raise SystemExit(f"{args.tokenizer} holds no tokenizer. Give the directory of one with --tokenizer.")
    results = benchmark(args.tokenizer, args.work_dir)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
