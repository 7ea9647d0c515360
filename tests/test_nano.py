"""The world of arcLM-nano: split, checkers, tokenizer, template, evaluation, and the kept parent."""

import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from arclm.nano import fast_delta_rule
from arclm.nano.build_tokenizer import build_tokenizer
from arclm.nano.evaluate import degeneration, evaluate, repeated_tokens
from arclm.nano.world import (
    FAMILIES,
    KINDS,
    MAKERS,
    check,
    generate_tasks,
    make_task,
    parse_tool_calls,
    split_of,
    tasks_per_family,
    to_row,
)


ALL_KINDS = [(family, kind) for family in FAMILIES for kind in KINDS[family]]


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer trained on fewer tasks than the kept one."""
    return build_tokenizer(num_tasks=2000)


def draw(split: str, count: int = 1500, seed: int = 3):
    return list(islice(generate_tasks(split, seed), count))


def answer_text(tokenizer, task) -> str:
    """What a perfect model generates, without the end token."""
    kwargs = {"tools": task.tools, "tokenize": False, "enable_thinking": task.enable_thinking}
    prompt = tokenizer.apply_chat_template(task.prompt, add_generation_prompt=True, **kwargs)
    whole = tokenizer.apply_chat_template(task.messages, **kwargs)
    assert whole.startswith(prompt)
    return whole[len(prompt) :].removesuffix("<|im_end|>\n")


def test_no_argument_value_is_in_both_splits():
    train, test = ({value for task in draw(split) for value in task.values} for split in ("train", "test"))
    assert len(train) > 500
    assert len(test) > 200
    assert not train & test
    assert {split_of(*value) for value in test} == {"test"}


def test_the_requests_contain_their_values():
    for task in draw("test", 300):
        if task.family == "tools":
            assert all(value in task.messages[0]["content"] for _, value in task.values)
        assert task.values


def test_the_same_seed_gives_the_same_tasks_and_another_seed_others():
    assert draw("train", 50, seed=5) == draw("train", 50, seed=5)
    assert draw("train", 50, seed=5) != draw("train", 50, seed=6)
    assert tasks_per_family("test", 1, 7) == tasks_per_family("test", 1, 7)


def test_there_are_at_least_six_kinds_and_the_generator_draws_all_of_them():
    assert len(ALL_KINDS) >= 6
    assert {(task.family, task.kind) for task in draw("train", 300)} == set(ALL_KINDS)


def test_an_unknown_split_gets_a_sentence():
    with pytest.raises(ValueError, match=r'split="valid" is unknown\. Choose train or test\.'):
        next(generate_tasks("valid", 0))


@pytest.mark.parametrize(("family", "kind"), ALL_KINDS)
def test_checker_accepts_the_reference_and_rejects_a_corrupted_one(tokenizer, family, kind):
    for task in [t for t in draw("test", 600) if t.kind == kind][:20]:
        text = answer_text(tokenizer, task)
        assert check(task, text)
        assert not check(task, text + " ")
        assert not check(task, text[:-1])
        # a wrong value inside the answer that decides
        head, end, answer = text.rpartition("</think>\n\n")
        position = max(i for i, c in enumerate(answer) if c.isalnum() and answer[i - 8 : i] != "</tool_c")
        position = answer.rindex("\n</parameter>") - 1 if family == "tools" else position
        wrong = answer[:position] + ("1" if answer[position] != "1" else "2") + answer[position + 1 :]
        assert not check(task, head + end + wrong)


def test_reasoning_needs_thoughts_and_one_end_of_them():
    task = next(t for t in draw("test") if t.family == "reasoning")
    answer = task.answer["content"]
    assert check(task, f"any thoughts\n</think>\n\n{answer}")
    assert not check(task, answer)
    assert not check(task, f"\n</think>\n\n{answer}")
    assert not check(task, f"thoughts\n</think>\n\n</think>\n\n{answer}")


def test_tool_calls_are_compared_as_calls_not_as_text():
    task = next(t for t in draw("test") if t.kind == "two_arguments")
    call = task.answer["tool_calls"][0]["function"]
    parameters = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in call["arguments"].items()]
    call_text = "<tool_call>\n<function={}>\n{}</function>\n</tool_call>"
    assert check(task, call_text.format(call["name"], "".join(reversed(parameters))))
    assert not check(task, call_text.format(call["name"], parameters[0]))
    assert not check(task, call_text.format(call["name"], parameters[0] * 2 + parameters[1]))
    assert not check(task, call_text.format("other", "".join(parameters)))
    assert parse_tool_calls("no call") is None


def test_the_right_function_is_among_two_to_four_offered():
    for task in draw("test", 300):
        if task.tools:
            offered = [tool["function"]["name"] for tool in task.tools]
            assert 2 <= len(offered) == len(set(offered)) <= 4
            assert {call["function"]["name"] for call in task.answer["tool_calls"]} <= set(offered)


def test_rows_hold_json_strings_where_datasets_would_fill_none():
    for task in draw("train", 100):
        row = json.loads(json.dumps(to_row(task)))
        assert row["enable_thinking"] == (task.family == "reasoning")
        if task.tools:
            assert json.loads(row["tools"]) == task.tools
            arguments = row["messages"][-1]["tool_calls"][0]["function"]["arguments"]
            assert json.loads(arguments) == task.answer["tool_calls"][0]["function"]["arguments"]
        else:
            assert "tools" not in row


@pytest.mark.parametrize("text", ["12 kato\n\n{}", "  two  spaces\t", "naïve नमस्ते 你好 🙂", '{"a": [1, {"b": 2}]}'])
def test_any_text_round_trips_and_digits_stand_alone(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.decode(i) for i in tokenizer("1234")["input_ids"]] == ["1", "2", "3", "4"]


def test_tokenizer_has_qwens_special_tokens_and_survives_a_round_trip(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert 300 <= len(loaded) <= 600
    assert (loaded.pad_token, loaded.eos_token) == ("<|endoftext|>", "<|im_end|>")
    for token in (
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<|fim_prefix|>",
    ):
        assert len(loaded(token)["input_ids"]) == 1
    assert loaded.decode(loaded("<think><|im_end|>")["input_ids"], skip_special_tokens=True) == "<think>"
    text = tokenizer.apply_chat_template(draw("test", 1)[0].messages, tokenize=False)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]["type"] == "Sequence"


def test_answers_have_10_to_150_tokens_and_the_mask_covers_exactly_them(tokenizer):
    for task in draw("test", 400) + draw("train", 400):
        row = tokenizer.apply_chat_template(
            task.messages, tools=task.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        answer = [i for i, m in zip(row["input_ids"], row["assistant_masks"], strict=True) if m]
        assert 10 <= len(answer) <= 150
        assert tokenizer.decode(answer) == answer_text(tokenizer, task) + "<|im_end|>"
        prompt = tokenizer.apply_chat_template(
            task.prompt, tools=task.tools, add_generation_prompt=True, enable_thinking=task.enable_thinking
        )["input_ids"]
        assert row["input_ids"] == prompt + answer + tokenizer("\n")["input_ids"]


def test_template_renders_the_format_of_qwen3_5(tokenizer):
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": ["x"]}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "reasoning_content": "hm", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "ok"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\ndone"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert tokenizer.apply_chat_template(messages, tools=tools, tokenize=False) == (
        "<|im_start|>system\nCall functions of:\n<tools>\n"
        '{"type": "function", "function": {"name": "f"}}\n</tools>\n\nBe brief.<|im_end|>\n'
        "<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n"
        '<parameter=b>\n["x"]\n</parameter>\n</function>\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nok\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nso\n</think>\n\ndone<|im_end|>\n"
    )


def test_generation_prompt_follows_enable_thinking(tokenizer):
    ask = [{"role": "user", "content": "hi"}]
    prompts = [
        tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True, **kwargs)
        for kwargs in ({}, {"enable_thinking": False}, {"enable_thinking": True})
    ]
    head = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert prompts == [head + "\n</think>\n\n", head + "\n</think>\n\n", head]


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([{"role": "assistant", "content": "a"}], "No user query found"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "System message must be at the beg"),
        ([{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}], "Unexpected message role"),
    ],
)
def test_template_refuses_what_qwens_refuses(tokenizer, messages, sentence):
    with pytest.raises(Exception, match=sentence):
        tokenizer.apply_chat_template(messages, tokenize=False)


class StubModel:
    """Answers every prompt from a list of texts, as `generate` of either model would."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, answers: dict[str, str], rate: float | None) -> None:
        self.tokenizer, self.answers, self.rate = tokenizer, answers, rate

    def generate(self, input_ids, attention_mask, return_dict_in_generate, **kwargs):
        assert (input_ids[:, -1] != self.tokenizer.pad_token_id).all(), "the batch is not left-padded"
        prompts = [self.tokenizer.decode(r[m.bool()]) for r, m in zip(input_ids, attention_mask, strict=True)]
        new = self.tokenizer(
            [self.answers[p] for p in prompts], return_tensors="pt", padding=True, padding_side="right"
        )
        output = SimpleNamespace(sequences=torch.cat([input_ids, new["input_ids"]], dim=1))
        if self.rate:
            output.tokens_per_forward = torch.full((len(prompts),), self.rate)
        return output


@pytest.mark.parametrize("rate", [None, 2.5])
def test_evaluate_counts_exact_matches_per_family_and_kind(tokenizer, rate):
    tasks = tasks_per_family("test", 0, 12)
    answers, end = {}, "<|im_end|>"
    for task in tasks:
        prompt = tokenizer.apply_chat_template(
            task.prompt,
            tools=task.tools,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=task.enable_thinking,
        )
        # every sort is answered wrongly, no reverse is ended
        text = answer_text(tokenizer, task)
        answers[prompt] = "No." + end if task.kind == "sort" else text if task.kind == "reverse" else text + end
    results = evaluate(StubModel(tokenizer, answers, rate), tokenizer, tasks, batch_size=5)
    families = results["families"]
    assert families["reasoning"]["accuracy"] == families["tools"]["accuracy"] == 1.0
    kinds = families["instructions"]["kinds"]
    assert {kind: row["accuracy"] for kind, row in kinds.items()} == {
        "sort": 0,
        "reverse": 0,
        "keep_even": 1,
        "repeat": 1,
    }
    assert families["instructions"]["accuracy"] == 0.5
    assert results["all"]["tasks"] == 36
    assert ("tokens_per_forward" in results["all"]) == (rate is not None)
    assert results["all"].get("tokens_per_forward") == rate


def test_repeated_tokens_counts_what_a_span_covers_in_a_row():
    assert repeated_tokens([1, 2, 3, 1, 2, 4, 4]) == 0  # twice is no repetition
    assert repeated_tokens([9, 4, 4, 4, 8]) == 3
    assert repeated_tokens([7, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1]) == 9
    assert repeated_tokens([5] * 20) == 20
    assert repeated_tokens(list(range(17)) * 3) == 0  # longer than the longest span


def test_degeneration_tells_floods_and_loops_from_right_and_wrong_answers(tokenizer):
    end = [tokenizer.eos_token_id]
    for task in draw("test", 200):
        right = tokenizer(answer_text(tokenizer, task), add_special_tokens=False).input_ids
        assert degeneration(tokenizer, task, right + end + [tokenizer.pad_token_id] * 5) is None
        assert degeneration(tokenizer, task, right[:3] + right[4:] + end) is None
    assert degeneration(tokenizer, task, right) == "no end"
    assert degeneration(tokenizer, task, [*right, tokenizer.pad_token_id, *end]) == "special tokens"
    word = right[-4:]
    assert degeneration(tokenizer, task, [*right, *word * 40, *end]) == "repeated span"


def test_fast_delta_rule_equals_transformers(monkeypatch):
    from transformers.models.qwen3_5 import modeling_qwen3_5

    generator = torch.Generator().manual_seed(0)
    shapes = {
        "query": (3, 53, 2, 5),
        "key": (3, 53, 2, 5),
        "value": (3, 53, 2, 7),
        "g": (3, 53, 2),
        "beta": (3, 53, 2),
    }
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs["g"], inputs["beta"] = -inputs["g"].abs(), inputs["beta"].sigmoid()
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    state = torch.randn(3, 2, 5, 7, generator=generator)
    kwargs = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    weight = torch.randn(3, 53, 2, 7, generator=generator)
    results = []
    for function in (modeling_qwen3_5.torch_chunk_gated_delta_rule, fast_delta_rule.chunk_gated_delta_rule):
        output, final = function(
            *(inputs[n] for n in ("query", "key", "value")), g=inputs["g"], beta=inputs["beta"], **kwargs
        )
        gradients = torch.autograd.grad((output * weight).sum() + final.sum(), list(inputs.values()))
        results.append((output, final, *gradients))
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, atol=2e-5, rtol=1e-4)


def test_every_maker_gives_both_splits():
    import random

    for family in MAKERS:
        for kind in MAKERS[family]:
            for split in ("train", "test"):
                task = make_task(family, kind, split, random.Random(0))
                assert {split_of(*value) for value in task.values} == {split}
