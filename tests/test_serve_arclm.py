"""The server, spoken to with OpenAI's own client."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import openai
import pytest
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.cli.serving.model_manager import ModelManager

from arclm.nano.world import tool_schema
from arclm.serve_arclm import extend_server


ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "nano" / "arclm-nano")
REVERSE = [{"role": "user", "content": "Reverse the letters f h k j."}]
REVERSED = "The reversed letters are j k h f."
SORT = [{"role": "user", "content": "Write the digits 398124 in order."}]
SORTED = "The sorted digits are 123489."
ADD = [{"role": "user", "content": "Add 672 and 762."}]
TRACK = [{"role": "user", "content": "Start with 9. Add 4. Add 3. Add 9. Take away 2. How many?"}]
THINK = {"chat_template_kwargs": {"enable_thinking": True}}
RENDERED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n".format(
    REVERSE[0]["content"]
)
END_TOKENS = [548, 550]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "serve_arclm.py"), MODEL, "--port", str(port), "--device", "cpu"]
    folder = tmp_path_factory.mktemp("serve")
    log = open(folder / "log", "w+")  # noqa: SIM115 (closed with the server)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder)}  # a computer without a cache
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=60)
    for _ in range(180):
        try:
            socket.create_connection(("localhost", port), timeout=1).close()
            break
        except OSError:
            assert server.poll() is None, Path(log.name).read_text()[-2000:]
            time.sleep(0.5)
    yield client
    server.terminate()
    server.wait()
    log.close()


def knobs(**values) -> dict:
    return {"generation_config": json.dumps(values)}


def chat(client, messages=REVERSE, **options):
    return client.chat.completions.create(**{"model": MODEL, "messages": messages, "temperature": 0} | options)


def text(client, **options) -> str:
    return chat(client, **options).choices[0].message.content


def chat_stream(client, **options) -> dict:
    """Join the pieces of a streamed answer, by name; the last piece has `finish_reason` and `usage`."""
    joined = {"content": "", "reasoning_content": "", "tool_calls": []}
    for piece in chat(client, stream=True, **options):
        for name, value in piece.choices[0].delta.model_dump(exclude_none=True).items():
            joined[name] = joined.get(name, "") + value if name != "tool_calls" else joined[name] + value
    return joined | {"finish_reason": piece.choices[0].finish_reason, "usage": piece.usage}


def test_chat_streamed_and_not(client):
    answer = chat(client, max_tokens=64)
    assert answer.choices[0].message.content == REVERSED
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 10
    streamed = chat_stream(client, max_tokens=64)
    assert (streamed["content"], streamed["reasoning_content"]) == (REVERSED, "")
    assert (streamed["finish_reason"], streamed["usage"].completion_tokens) == ("stop", 10)


def test_completions_streamed_and_not(client):
    options = {"model": MODEL, "prompt": RENDERED, "temperature": 0, "max_tokens": 64}
    assert client.completions.create(**options).choices[0].text == REVERSED
    pieces = [piece.choices[0] for piece in client.completions.create(stream=True, **options)]
    assert "".join(piece.text for piece in pieces) == REVERSED
    assert pieces[-1].finish_reason == "stop"


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens"])
def test_stop_and_max_tokens(client, key):
    stop = {key: 64, "stop": [" k", "zzz"]}
    assert text(client, **stop) == chat_stream(client, **stop)["content"] == "The reversed letters are j k"
    cut = chat(client, **{key: 3}).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("The reversed letters", "length")
    assert chat_stream(client, **{key: 3})["finish_reason"] == "length"


def test_the_seed_decides_where_tokens_are_drawn_and_nothing_at_temperature_0(client):
    drawn = {"max_tokens": 16, "temperature": 8}
    first = text(client, seed=3, **drawn)
    assert first == text(client, seed=3, **drawn) == chat_stream(client, seed=3, **drawn)["content"]
    assert first != text(client, seed=4, **drawn)
    assert text(client, seed=3) == text(client, seed=4) == REVERSED


def test_thoughts_arrive_as_reasoning_content(client):
    message = chat(client, ADD, extra_body=THINK).choices[0].message
    streamed = chat_stream(client, messages=ADD, extra_body=THINK)
    assert message.reasoning_content == streamed["reasoning_content"] == "2+2+0=04\n7+6+0=13\n6+7+1=14"
    assert message.content == streamed["content"] == "The sum is 1434."


def test_tool_calls_arrive_as_tool_calls_and_their_results_can_be_sent_back(client):
    messages = [{"role": "user", "content": "Set a timer for 35 minutes and tell me the time in Mekeri."}]
    options = {"messages": messages, "tools": [tool_schema(name) for name in ("call", "get_time", "set_timer")]}
    answer, streamed = chat(client, **options).choices[0], chat_stream(client, **options)
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in answer.message.tool_calls]
    assert calls == [("set_timer", {"minutes": 35}), ("get_time", {"city": "Mekeri"})]  # 35: the schema says integer
    assert answer.finish_reason == streamed["finish_reason"] == "tool_calls"
    assert answer.message.content == streamed["content"] == streamed["reasoning_content"] == ""
    functions = [call.function.model_dump() for call in answer.message.tool_calls]
    assert [call["function"] for call in streamed["tool_calls"]] == functions
    assert [call["index"] for call in streamed["tool_calls"]] == [0, 1]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "done"} for call in answer.message.tool_calls]
    options["messages"] = [*messages, answer.message.model_dump(exclude_none=True), *results]
    assert chat(client, max_tokens=16, **options).usage.prompt_tokens > chat(client, ADD).usage.prompt_tokens


def test_responses(client):
    options = {"model": MODEL, "temperature": 0, "stream": False}
    assert client.responses.create(input=REVERSE, **options).output_text == REVERSED
    tools = [{"type": "function"} | tool_schema(name)["function"] for name in ("call", "get_time")]
    calls = client.responses.create(input="Tell me the time in Metari.", tools=tools, **options).output
    calls = [(call.name, call.arguments) for call in calls if call.type == "function_call"]
    assert calls == [("get_time", '{"city": "Metari"}')]


def test_our_knobs_travel_in_the_body(client):
    # four sums, each of which needs the one before it, at one step per block
    hurried = text(client, messages=TRACK, extra_body=THINK | knobs(max_denoising_steps=1))
    assert hurried != text(client, messages=TRACK, extra_body=THINK)
    # without max_tokens it is the model's own number of tokens that cuts the answer
    endless = knobs(max_denoising_steps=1, suppress_tokens=END_TOKENS)
    assert chat(client, extra_body=endless).choices[0].finish_reason == "length"
    assert chat_stream(client, extra_body=endless)["finish_reason"] == "length"


BAD_KNOBS = {
    "remasking_strategy='best' is unknown. Choose one of low_confidence_static,": {"remasking_strategy": "best"},
    "block_size=17 is outside [1, 16], up to the trained size.": {"block_size": 17},
    "steps=0 must be at least 1.": {"steps": 0},
    "confidence_threshold=1.5 is outside [0, 1].": {"confidence_threshold": 1.5},
    "num_beams=4 does not go with block diffusion.": {"num_beams": 4},
    "generation_config has the unknown names blok_size, stpes. Choose among the fields of GenerationConfig and "
    "block_size, confidence_threshold, entropy_bound, max_denoising_steps,": {"stpes": 2, "blok_size": 4},
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_knob_gets_400_and_the_sentence_of_our_error(client, stream):
    for sentence, values in BAD_KNOBS.items():
        body = {"stream": stream, "extra_body": knobs(**values)}
        for ask in (
            lambda body=body: chat(client, **body),
            lambda body=body: client.completions.create(model=MODEL, prompt=RENDERED, **body),
            lambda body=body: client.responses.create(model=MODEL, input=REVERSE, **body),
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                ask()
            assert refused.value.body["detail"].startswith(sentence)
    assert text(client) == REVERSED


NO_OBJECT = "generation_config must be a string with a JSON object, got "
BAD_BODIES = {
    "A prompt of 4012 tokens and 1024 new ones reach beyond the 2048": {
        "messages": [{**REVERSE[0], "content": "k " * 4000}]
    },
    "No user query found in messages.": {"messages": [{**REVERSE[0], "role": "assistant"}]},
    "Server is pinned to": {"model": "another"},
    f"{NO_OBJECT}'{{steps: 2}}'": {"extra_body": {"generation_config": "{steps: 2}"}},
    f"{NO_OBJECT}'[1]'": {"extra_body": {"generation_config": "[1]"}},
    f"{NO_OBJECT}{{'steps': 2}}": {"extra_body": {"generation_config": {"steps": 2}}},
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_gets_400_and_a_sentence(client, stream):
    for sentence, body in BAD_BODIES.items():
        with pytest.raises(openai.BadRequestError) as refused:
            chat(client, stream=stream, **body)
        assert refused.value.body["detail"].startswith(sentence)
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        chat(client, stream=stream, extra_body={"block_size": 4})
    assert refused.value.body["detail"] == "Unexpected fields in the request: {'block_size'}"
    assert text(client) == REVERSED


def test_two_requests_at_once(client):
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(text, client, messages=messages) for messages in (REVERSE, SORT)]
    assert [answer.result() for answer in answers] == [REVERSED, SORTED]


def test_the_answer_to_a_client_that_goes_away_is_not_generated_to_its_end(client):
    start = time.monotonic()
    stream = chat(client, stream=True, extra_body=knobs(suppress_tokens=END_TOKENS, max_new_tokens=2000))
    next(piece for piece in stream if piece.choices[0].delta.content)
    block = time.monotonic() - start  # the first of 125
    stream.close()
    start = time.monotonic()
    assert text(client) == REVERSED
    assert time.monotonic() - start < 40 * block


def test_the_served_model_is_listed_without_a_cache_of_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    with urlopen(str(client.base_url).replace("/v1/", "/health")) as answer:
        assert json.load(answer) == {"status": "ok"}


def test_the_loader_keeps_the_options_of_the_server(monkeypatch):
    extend_server()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda path, **options: options)
    given = {"device": "cpu", "dtype": "float32", "attn_implementation": "eager", "quantization": "bnb-8bit"}
    manager, stages = ModelManager(trust_remote_code=True, **given), []
    options = manager._load_model(f"{MODEL}@v1", tqdm_class=tqdm, progress_callback=stages.append)
    assert options.pop("quantization_config").load_in_8bit
    assert options == {
        "device_map": "cpu",
        "dtype": torch.float32,
        "attn_implementation": "eager",
        "revision": "v1",
        "tqdm_class": tqdm,
        "trust_remote_code": True,
    }
    assert [stage["stage"] for stage in stages] == ["config"]


def test_it_says_which_packages_are_missing():
    code = "import sys; sys.modules['fastapi'] = None; sys.argv = ['x']; import serve_arclm; serve_arclm.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "serve_arclm.py: Missing dependencies for serving. Install with" in done.stderr
