"""The way in through lm-evaluation-harness: its own `hf` model, on arcLM-nano."""

from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


ROOT = Path(__file__).resolve().parents[1]
MODEL_ARGS = (
    f"pretrained={ROOT / 'nano' / 'arclm-nano'},trust_remote_code=True,dtype=float32,"
    "enable_thinking=True,think_end_token=</think>"
)
TASK = "nano_gsm8k"
NUM_TASKS = 12


def run(batch_size: int) -> tuple[dict[str, float], list[str]]:
    """The scores by filter, and what was generated after the thoughts, task by task."""
    results = simple_evaluate(
        "hf",
        model_args=MODEL_ARGS,
        tasks=[TASK],
        # without the harness' own tasks: it would read thousands of files
        task_manager=TaskManager(include_path=str(ROOT / "benchmarks" / "lm_eval_tasks"), include_defaults=False),
        apply_chat_template=True,
        batch_size=batch_size,
        device="cpu",
        limit=NUM_TASKS,
        bootstrap_iters=0,
    )
    scores = {name: score for name, score in results["results"][TASK].items() if name.startswith("exact_match,")}
    samples = [sample for sample in results["samples"][TASK] if sample["filter"] == "strict-match"]
    return scores, [sample["resps"][0][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def test_the_harness_gives_the_same_good_scores_at_batch_sizes_1_and_4():
    scores, generations = run(1)
    assert scores.keys() == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert min(scores.values()) > 0.8, generations
    assert len(generations) == NUM_TASKS
    assert run(4) == (scores, generations)
