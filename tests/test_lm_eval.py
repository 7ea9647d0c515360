"""The way in through lm-evaluation-harness: its own `hf` model, on arcLM-nano."""

from pathlib import Path

from lm_eval_nano import run


ROOT = Path(__file__).resolve().parents[1]
NUM_TASKS = 12


def test_the_harness_gives_the_same_good_scores_at_batch_sizes_1_and_4():
    scores, generations = run(str(ROOT / "nano" / "arclm-nano"), batch_size=1, limit=NUM_TASKS)
    assert scores.keys() == {"strict-match", "flexible-extract"}
    assert min(scores.values()) > 0.8, generations
    assert len(generations) == NUM_TASKS
    assert run(str(ROOT / "nano" / "arclm-nano"), batch_size=4, limit=NUM_TASKS) == (scores, generations)
