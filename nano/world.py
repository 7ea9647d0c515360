"""The world of arcLM-nano: small chat tasks, each with an exact checker, split by held-out argument values.

Ten kinds of tasks in three families, all in chat format:

- reasoning: `add`, `track`, `largest`. The steps stand in `<think>`, every step needs the one before it.
- tools: `one_argument`, `two_arguments`, `two_calls`. Two to four tools are offered, the values are copied.
- instructions: `reverse`, `sort`, `repeat`, `keep_even`. One sentence with the result, no thinking.

The split is by construction: every argument value (a number, name, word or list) belongs to "train" or "test" by a
hash of itself (`split_of`). A train task has no argument of the test part, a test task none of the train part.
Results (a sum, a running total) are not arguments and may be any number.

As a script it writes tasks as JSON lines: `python nano/world.py --output_file train.jsonl --num_tasks 20000`.
"""

import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path


SPLITS = ("train", "test")
TEST_SHARE = 5  # one argument value in five is held out


@dataclass(frozen=True)
class Task:
    """One chat with its reference answer.

    Fields:
        family: "reasoning", "tools" or "instructions".
        kind: one of `KINDS[family]`.
        split: "train" or "test".
        messages: the user turn and the assistant turn, in the chat format of Qwen3.5's template.
        tools: the offered functions (JSON schema), or None.
        values: the argument values as (value kind, value), all of them in `split`.
    """

    family: str
    kind: str
    split: str
    messages: list[dict]
    tools: list[dict] | None = None
    values: tuple[tuple[str, str], ...] = field(default=())

    @property
    def prompt(self) -> list[dict]:
        """The messages before the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> dict:
        """The reference answer, an assistant message."""
        return self.messages[-1]

    @property
    def enable_thinking(self) -> bool:
        """Whether the generation prompt leaves the think block open."""
        return self.family == "reasoning"


def split_of(value_kind: str, value: str) -> str:
    """Say to which split an argument value belongs, by a hash that is the same on every machine."""
    return "test" if zlib.crc32(f"{value_kind}:{value}".encode()) % TEST_SHARE == 0 else "train"


class Values:
    """Draws argument values of one split and remembers what it drew.

    Args:
        rng: source of randomness.
        split: "train" or "test".
    """

    def __init__(self, rng: random.Random, split: str) -> None:
        self.rng = rng
        self.split = split
        self.drawn: list[tuple[str, str]] = []

    def draw(self, value_kind: str, make: Callable[[], str]) -> str:
        """Call `make` until its value belongs to the split."""
        value = make()
        while split_of(value_kind, value) != self.split:
            value = make()
        self.drawn.append((value_kind, value))
        return value

    def number(self, low: int = 10, high: int = 999) -> int:
        """A number in [low, high]."""
        return int(self.draw("number", lambda: str(self.rng.randint(low, high))))

    def word(self) -> str:
        """A word of two or three syllables, such as "kato"."""
        return self.draw("word", lambda: self._syllables(self.rng.randint(2, 3)))

    def name(self) -> str:
        """A capitalised name of two or three syllables, such as "Miralo"."""
        return self.draw("name", lambda: self._syllables(self.rng.randint(2, 3)).capitalize())

    def text(self) -> str:
        """Two or three words."""
        return " ".join(self.word() for _ in range(self.rng.randint(2, 3)))

    def digits(self, low: int, high: int) -> str:
        """A string of `low` to `high` digits."""
        return self.draw("digits", lambda: "".join(self.rng.choices("0123456789", k=self.rng.randint(low, high))))

    def letters(self, low: int, high: int) -> list[str]:
        """A list of `low` to `high` different letters."""
        return self.draw("letters", lambda: " ".join(self.rng.sample(LETTERS, self.rng.randint(low, high)))).split()

    def _syllables(self, count: int) -> str:
        return "".join(self.rng.choice("kmnrt") + self.rng.choice("aeio") for _ in range(count))


LETTERS = "abcdefghijklmnop"


def reasoning(question: str, steps: list[str], answer: str) -> list[dict]:
    """Make the two turns of a reasoning task."""
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "reasoning_content": "\n".join(steps), "content": answer},
    ]


def make_add(values: Values) -> list[dict]:
    """Column addition of two numbers of two or three digits, lowest digit first, the carry is the third summand."""
    a, b = values.number(), values.number()
    question = values.rng.choice(["Add {} and {}.", "What is {} plus {}?", "Compute {} + {}."]).format(a, b)
    steps, carry = [], 0
    for column in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**column % 10, b // 10**column % 10
        steps.append(f"{x}+{y}+{carry}={x + y + carry:02d}")
        carry = (x + y + carry) // 10
    return reasoning(question, steps, f"The sum is {a + b}.")


def make_track(values: Values) -> list[dict]:
    """Follow a count through three or four small steps, writing every intermediate value."""
    rng = values.rng

    def make() -> str:
        count = total = rng.randint(1, 9)
        steps = []
        for _ in range(rng.randint(3, 4)):
            step = rng.randint(1, 9) * (1 if total < 9 or rng.random() < 0.6 else -1)
            total += step
            steps.append(f"{step:+d}")
        return f"{count} {' '.join(steps)}"

    start, *steps = values.draw("track", make).split()
    add, take = rng.choice([("Add", "Take away"), ("Win", "Lose"), ("Get", "Give")])
    question = f"Start with {start}. " + " ".join(f"{add if s[0] == '+' else take} {s[1:]}." for s in steps)
    lines, total = [], int(start)
    for step in steps:
        lines.append(f"{total}{step}={total + int(step)}")
        total += int(step)
    return reasoning(question + " How many?", lines, f"The count is {total}.")


def make_largest(values: Values) -> list[dict]:
    """Find the largest of three or four numbers of two digits by a running maximum."""
    numbers = [values.number(10, 99) for _ in range(values.rng.randint(3, 4))]
    question = values.rng.choice(
        ["Which is the largest: {}?", "Find the largest of {}.", "What is the maximum of {}?"]
    )
    steps, best = [], numbers[0]
    for number in numbers[1:]:
        # both numbers stand before the result, so that it can be read off the line
        steps.append(f"{best},{number}:{max(best, number)}")
        best = max(best, number)
    return reasoning(question.format(", ".join(map(str, numbers))), steps, f"The largest is {best}.")


# name -> (parameters with their JSON type and value kind, wordings of a request)
FUNCTIONS: dict[str, tuple[dict[str, tuple[str, str]], list[str]]] = {
    "get_weather": (
        {"city": ("string", "name")},
        ["what is the weather in {city}", "tell me the weather of {city}", "how is the weather in {city}"],
    ),
    "get_time": (
        {"city": ("string", "name")},
        ["what time is it in {city}", "tell me the time in {city}"],
    ),
    "call": (
        {"name": ("string", "name")},
        ["call {name}", "start a call to {name}"],
    ),
    "play_song": (
        {"title": ("string", "text")},
        ["play the song {title}", "I want to hear {title}"],
    ),
    "set_timer": (
        {"minutes": ("integer", "number")},
        ["set a timer for {minutes} minutes", "start a timer of {minutes} minutes"],
    ),
    "set_light": (
        {"level": ("integer", "number")},
        ["set the light to {level}", "I want the light at level {level}"],
    ),
    "send_message": (
        {"name": ("string", "name"), "text": ("string", "text")},
        ["send the message {text} to {name}", "tell {name} the message {text}"],
    ),
    "find_route": (
        {"start": ("string", "name"), "end": ("string", "name")},
        ["find the route from {start} to {end}", "how do I get to {end} from {start}"],
    ),
    "book_table": (
        {"name": ("string", "name"), "count": ("integer", "number")},
        ["book a table for {count} at {name}", "at {name} I want a table for {count}"],
    ),
    "buy_item": (
        {"item": ("string", "word"), "count": ("integer", "number")},
        ["buy {count} {item}", "get me {count} of {item}"],
    ),
}


def tool_schema(name: str) -> dict:
    """Describe a function of `FUNCTIONS` as the JSON schema that a chat template takes."""
    parameters, _ = FUNCTIONS[name]
    properties = {key: {"type": json_type} for key, (json_type, _) in parameters.items()}
    # no "required" list: every parameter is, and the prompt stays a quarter shorter
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def make_calls(values: Values, names: list[str]) -> tuple[list[dict], list[dict]]:
    """Make the turns and the offered tools of a request that needs the functions `names`, in this order."""
    rng = values.rng
    requests, calls = [], []
    for name in names:
        parameters, wordings = FUNCTIONS[name]
        arguments = {key: getattr(values, value_kind)() for key, (_, value_kind) in parameters.items()}
        requests.append(rng.choice(wordings).format(**arguments))
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    others = [name for name in FUNCTIONS if name not in names]
    offered = names + rng.sample(others, rng.randint(2, 4) - len(names))
    rng.shuffle(offered)
    request = " and ".join(requests)
    messages = [
        {"role": "user", "content": request[0].upper() + request[1:] + "."},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    return messages, [tool_schema(name) for name in offered]


def functions_with(parameters: int) -> list[str]:
    """The functions that take this many parameters."""
    return [name for name, (schema, _) in FUNCTIONS.items() if len(schema) == parameters]


def make_one_argument(values: Values) -> tuple[list[dict], list[dict]]:
    """Call one function of one parameter."""
    return make_calls(values, [values.rng.choice(functions_with(1))])


def make_two_arguments(values: Values) -> tuple[list[dict], list[dict]]:
    """Call one function of two parameters; the request may name them in another order than the schema."""
    return make_calls(values, [values.rng.choice(functions_with(2))])


def make_two_calls(values: Values) -> tuple[list[dict], list[dict]]:
    """Call two functions of one parameter in the order of the request."""
    return make_calls(values, values.rng.sample(functions_with(1), 2))


def instruction(question: str, answer: str) -> list[dict]:
    """Make the two turns of an instruction task."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def make_reverse(values: Values) -> list[dict]:
    """Reverse a list of four to six letters."""
    letters = values.letters(4, 6)
    question = values.rng.choice(["Reverse the letters {}.", "Write the letters {} in reverse."])
    return instruction(question.format(" ".join(letters)), f"The reversed letters are {' '.join(letters[::-1])}.")


def make_sort(values: Values) -> list[dict]:
    """Sort four to six digits."""
    digits = values.digits(4, 6)
    question = values.rng.choice(["Sort the digits {}.", "Write the digits {} in order."])
    return instruction(question.format(digits), f"The sorted digits are {''.join(sorted(digits))}.")


def make_keep_even(values: Values) -> list[dict]:
    """Keep the even digits of four to seven, in their order."""
    digits = values.digits(4, 7)
    even = "".join(d for d in digits if d in "02468") or "none"
    question = values.rng.choice(["Keep the even digits of {}.", "Which digits of {} are even?"])
    return instruction(question.format(digits), f"The even digits of {digits} are {even}.")


def make_repeat(values: Values) -> list[dict]:
    """Write a word two to four times."""
    word, times = values.word(), values.rng.randint(2, 4)
    question = values.rng.choice(["Write {word} {times} times.", "Repeat {times} times the word {word}."])
    answer = f"Here is the word {times} times: {' '.join([word] * times)}."
    return instruction(question.format(word=word, times=times), answer)


MAKERS: dict[str, dict[str, Callable]] = {
    "reasoning": {"add": make_add, "track": make_track, "largest": make_largest},
    "tools": {"one_argument": make_one_argument, "two_arguments": make_two_arguments, "two_calls": make_two_calls},
    "instructions": {"reverse": make_reverse, "sort": make_sort, "keep_even": make_keep_even, "repeat": make_repeat},
}
FAMILIES = tuple(MAKERS)
KINDS = {family: tuple(makers) for family, makers in MAKERS.items()}


def make_task(family: str, kind: str, split: str, rng: random.Random) -> Task:
    """Draw one task of a kind.

    Args:
        family: one of `FAMILIES`.
        kind: one of `KINDS[family]`.
        split: "train" or "test".
        rng: source of randomness.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f'split="{split}" is unknown. Choose train or test.')
    values = Values(rng, split)
    made = MAKERS[family][kind](values)
    messages, tools = made if isinstance(made, tuple) else (made, None)
    return Task(family, kind, split, messages, tools, tuple(values.drawn))


def generate_tasks(split: str, seed: int, reasoning_weight: int = 1) -> Iterator[Task]:
    """Yield tasks without end, every kind equally often, but those of reasoning `reasoning_weight` times as often.

    The same arguments give the same tasks on every machine (`random.Random` with a string seed).
    """
    rng = random.Random(f"{split}:{seed}")
    weights = {family: reasoning_weight if family == "reasoning" else 1 for family in FAMILIES}
    kinds = [(family, kind) for family in FAMILIES for kind in KINDS[family] for _ in range(weights[family])]
    while True:
        yield make_task(*rng.choice(kinds), split, rng)


def tasks_per_family(split: str, seed: int, count: int) -> list[Task]:
    """Draw `count` tasks of every family, their kinds in turn, families one after the other."""
    rng = random.Random(f"{split}:{seed}:{count}")
    return [
        make_task(family, KINDS[family][index % len(KINDS[family])], split, rng)
        for family in FAMILIES
        for index in range(count)
    ]


TOOL_CALL = re.compile(
    r"<tool_call>\n<function=(\w+)>\n((?:<parameter=\w+>\n.*?\n</parameter>\n)*)</function>\n</tool_call>"
)
PARAMETER = re.compile(r"<parameter=(\w+)>\n(.*?)\n</parameter>\n")


def parse_tool_calls(text: str) -> list[tuple[str, dict[str, str]]] | None:
    """Read an answer that consists of tool calls in Qwen3.5's format.

    Returns:
        (function name, arguments) of every call, or None where a text is outside the format or a parameter comes
        twice.
    """
    calls = []
    for name, body in TOOL_CALL.findall(text):
        parameters = PARAMETER.findall(body)
        if len(parameters) != len(dict(parameters)):
            return None
        calls.append((name, dict(parameters)))
    # one newline between calls and nothing else, before, between or after
    return calls if calls and TOOL_CALL.sub("", text) == "\n" * (len(calls) - 1) else None


def check(task: Task, text: str) -> bool:
    """Say whether a generated text answers the task.

    Reasoning: non-empty thoughts, one `</think>`, then exactly the reference answer; the thoughts are not compared.
    Tools: the same calls in the same order with the same arguments, in any order of the parameters.
    Instructions: exactly the reference answer.

    Args:
        task: the task.
        text: what was generated after the generation prompt, without the end token.
    """
    if task.family == "reasoning":
        thoughts, end, answer = text.partition("\n</think>\n\n")
        well_formed = bool(thoughts.strip()) and bool(end) and "think>" not in thoughts + answer
        return well_formed and answer == task.answer["content"]
    if task.family == "tools":
        calls = [call["function"] for call in task.answer["tool_calls"]]
        expected = [(c["name"], {key: str(value) for key, value in c["arguments"].items()}) for c in calls]
        return parse_tool_calls(text) == expected
    return text == task.answer["content"]


def to_row(task: Task) -> dict:
    """Make the row of a JSONL file for the trainer.

    `tools` and the `arguments` of calls are JSON strings: `datasets` would fill the keys that other rows have with
    None, and the chat template would print them.
    """
    messages = [dict(message) for message in task.messages]
    for message in messages:
        if "tool_calls" in message:
            message["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
    row = {"messages": messages, "enable_thinking": task.enable_thinking, "family": task.family, "kind": task.kind}
    return row | ({"tools": json.dumps(task.tools)} if task.tools else {})


@dataclass
class WorldArguments:
    """What to write."""

    output_file: str = field(metadata={"help": "JSONL file to write, one task per line."})
    num_tasks: int = field(default=20_000, metadata={"help": "Number of tasks."})
    seed: int = field(default=0, metadata={"help": "Seed of the generator."})
    split: str = field(default="train", metadata={"help": "train or test."})
    reasoning_weight: int = field(
        default=1, metadata={"help": "How many times as often each reasoning kind is drawn."}
    )


def main() -> None:
    """Write tasks as JSON lines."""
    from transformers import HfArgumentParser  # a slow import that the world itself does not need

    args = HfArgumentParser(WorldArguments).parse_args_into_dataclasses()[0]
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    with open(args.output_file, "w", encoding="utf-8") as file:
        for task in islice(generate_tasks(args.split, args.seed, args.reasoning_weight), args.num_tasks):
            file.write(json.dumps(to_row(task)) + "\n")


if __name__ == "__main__":
    main()
