"""The data of `nano_gsm8k.yaml`."""

from datasets import Dataset

from arclm.nano.world import tasks_per_family


def load(num_tasks: int, seed: int, **_) -> dict[str, Dataset]:
    """Write held-out reasoning tasks as GSM8K does.

    Args:
        num_tasks: number of tasks; `add`, `track` and `largest` take turns.
        seed: seed of the tasks. The same arguments give the same tasks on every machine.
        _: what the harness adds, such as the version of the task.

    Returns:
        the split "test" with the columns `question` and `answer`: the steps, then `#### 1054`.
    """
    rows = []
    for task in tasks_per_family("test", seed, num_tasks):
        if task.family == "reasoning":
            result = task.answer["content"].rstrip(".").split()[-1]
            answer = f"{task.answer['reasoning_content']}\n#### {result}"
            rows.append({"question": task.prompt[0]["content"], "answer": answer})
    return {"test": Dataset.from_list(rows)}
