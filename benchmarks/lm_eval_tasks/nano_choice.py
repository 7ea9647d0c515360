"""The data of `nano_choice.yaml`."""

from datasets import Dataset

from arclm.nano.world import tasks_per_family


NUM_WRONG = 3


def load(num_tasks: int, seed: int, **_) -> dict[str, Dataset]:
    """Write held-out tasks of the kind `reverse` as questions with one right and three wrong answers.

    A wrong answer has two neighbouring letters of the right one swapped, so it can only be told by the question.

    Args:
        num_tasks: number of tasks of the family, a quarter of which are of this kind.
        seed: seed of the tasks. The same arguments give the same tasks on every machine.
        _: what the harness adds, such as the version of the task.

    Returns:
        the split "test" with the columns `question`, `choices` and `label`, the index of the right one.
    """
    rows = []
    for task in tasks_per_family("test", seed, num_tasks):
        if task.kind == "reverse":
            answer = task.answer["content"]
            text, *letters = answer.rstrip(".").rsplit(" ", len(task.values[0][1].split()))
            choices = []
            for i in range(NUM_WRONG):
                wrong = [*letters[:i], letters[i + 1], letters[i], *letters[i + 2 :]]
                choices.append(f"{text} {' '.join(wrong)}.")
            # in turn: where all scores are equal the harness takes the first choice
            label = len(rows) % (NUM_WRONG + 1)
            choices.insert(label, answer)
            rows.append({"question": task.prompt[0]["content"], "choices": choices, "label": label})
    return {"test": Dataset.from_list(rows)}
