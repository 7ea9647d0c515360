"""The server, spoken to with OpenAI's own client."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest


ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "nano" / "arclm-nano")
REVERSE = [{"role": "user", "content": "Reverse the letters f h k j."}]
REVERSED = "The reversed letters are j k h f."


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "serve_arclm.py"), MODEL, "--port", str(port), "--device", "cpu"]
    log = open(tmp_path_factory.mktemp("serve") / "log", "w+")  # noqa: SIM115 (closed with the server)
    server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
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


def chat(client, messages=REVERSE, **options):
    return client.chat.completions.create(**{"model": MODEL, "messages": messages, "temperature": 0} | options)


def test_chat_streamed_and_not(client):
    answer = chat(client, max_tokens=64)
    assert answer.choices[0].message.content == REVERSED
    assert answer.choices[0].finish_reason == "stop"
    pieces = [c.choices[0].delta.content for c in chat(client, max_tokens=64, stream=True) if c.choices]
    assert "".join(filter(None, pieces)) == REVERSED
    assert answer.usage.completion_tokens == 10


def test_completions_with_a_rendered_prompt(client):
    prompt = "<|im_start|>user\nReverse the letters f h k j.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=64)
    assert answer.choices[0].text == REVERSED


def test_stop_and_max_tokens(client):
    assert chat(client, max_tokens=64, stop=[" k"]).choices[0].message.content == "The reversed letters are j k"
    cut = chat(client, max_tokens=3).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("The reversed letters", "length")


def test_our_knobs_and_the_seed_travel_in_the_body(client):
    knobs = {"generation_config": '{"max_denoising_steps": 2, "max_new_tokens": 40, "do_sample": true}'}
    first, again = (chat(client, temperature=1, seed=3, extra_body=knobs).choices[0].message.content for _ in "ab")
    assert first == again
    with pytest.raises(openai.UnprocessableEntityError):
        chat(client, extra_body={"blok_size": 4})


def test_two_requests_at_once_and_a_client_that_goes_away(client):
    stream = chat(client, max_tokens=64, stream=True)
    next(iter(stream))
    stream.close()
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: chat(client, max_tokens=64).choices[0].message.content, range(2)))
    assert answers == [REVERSED] * 2


def test_it_says_which_packages_are_missing():
    code = "import sys; sys.modules['fastapi'] = None; sys.argv = ['x']; import serve_arclm; serve_arclm.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "serve_arclm.py: Missing dependencies for serving. Install with" in done.stderr
