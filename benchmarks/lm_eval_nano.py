"""Scores of arcLM-nano and its parent in lm-evaluation-harness, at batch sizes 1 and 4.

    python benchmarks/lm_eval_nano.py

runs the tasks of benchmarks/lm_eval_tasks on nano/arclm-nano-base and nano/arclm-nano and writes
benchmarks/results/lm_eval_nano.json. nano_gsm8k: by the harness' own `hf` model, greedy. The 400 tasks are the
reasoning tasks of nano_first.py, so its figures at one token per step have to come out again. "same_generations"
counts the tasks with the same text at both batch sizes. nano_choice, by log-likelihoods: the parent by `hf`,
arcLM-nano by lm_eval_arclm.py.
"""

import time
from dataclasses import dataclass

from common import RESULTS, ROOT, SHAPES, start_record, write_record
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from arclm.lm_eval_arclm import ArcLMEval


# without the harness' own tasks: it would read thousands of files
TASKS = TaskManager(include_path=str(ROOT / "benchmarks" / "lm_eval_tasks"), include_defaults=False)
TASK, CHOICE = "nano_gsm8k", "nano_choice"
BATCH_SIZES = (1, 4)
MODEL_ARGS = "pretrained={},trust_remote_code=True,dtype=float32,enable_thinking=True,think_end_token=</think>"


@dataclass
class LmEvalNanoArguments:
    """What to measure."""

    parent: str = HfArg(default=str(ROOT / "nano" / "arclm-nano-base"), help="Directory of the parent.")
    model: str = HfArg(default=str(SHAPES["nano"]), help="Directory of the converted, trained model.")
    limit: int | None = HfArg(default=None, help="Number of tasks, all 400 if unset.")
    output_file: str = HfArg(default=str(RESULTS / "lm_eval_nano.json"), help="Result file.")


def run(path: str, batch_size: int, limit: int | None) -> tuple[dict[str, float], list[str]]:
    """Run the task.

    Returns:
        accuracy in [0, 1] by filter, and what was generated after the thoughts, task by task.
    """
    results = simple_evaluate(
        "hf",
        model_args=MODEL_ARGS.format(path),
        tasks=[TASK],
        task_manager=TASKS,
        apply_chat_template=True,
        batch_size=batch_size,
        device="cpu",
        limit=limit,
        bootstrap_iters=0,
    )
    samples = [sample for sample in results["samples"][TASK] if sample["filter"] == "strict-match"]
    generations = [sample["resps"][0][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    scores = results["results"][TASK]
    filters = ("strict-match", "flexible-extract")
    return {name: float(scores[f"exact_match,{name}"]) for name in filters}, generations


def choose(kind: type[HFLM], path: str, limit: int | None) -> float:
    """Run the multiple-choice task; returns the accuracy in [0, 1], where one in four is chance."""
    model = kind(path, trust_remote_code=True, dtype="float32", enable_thinking=False, device="cpu", batch_size=16)
    results = simple_evaluate(model, tasks=[CHOICE], task_manager=TASKS, apply_chat_template=True, limit=limit)
    return float(results["results"][CHOICE]["acc,none"])


def main() -> None:
    """Measure, write, print."""
    args = HfArgumentParser(LmEvalNanoArguments).parse_args_into_dataclasses()[0]
    what = "lm-evaluation-harness: exact match, greedy, one token per denoising step; accuracy of nano_choice."
    record = start_record(what, "cpu", packages=("lm_eval",))
    models, start = {}, time.perf_counter()
    for name, path, kind in (("parent", args.parent, HFLM), ("arclm", args.model, ArcLMEval)):
        runs = {size: run(path, size, args.limit) for size in BATCH_SIZES}
        one, four = (generations for _, generations in runs.values())
        models[name] = {f"batch_{size}": scores for size, (scores, _) in runs.items()}
        models[name]["same_generations"] = sum(a == b for a, b in zip(one, four, strict=True))
        models[name][CHOICE] = choose(kind, path, args.limit)
    record |= {
        "task": f"benchmarks/lm_eval_tasks/{TASK}.yaml",
        "tasks": len(one),
        "seconds": round(time.perf_counter() - start),
        "models": models,
    }
    print(models)
    write_record(record, args.output_file)


if __name__ == "__main__":
    main()
