"""The terminal chat, driven through a real terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm", "COLUMNS": "100", "LINES": "40", "OMP_NUM_THREADS": "1"}
            script, model = str(ROOT / "chat_arclm.py"), str(ROOT / "nano" / "arclm-nano")
            os.execv(sys.executable, [sys.executable, script, "--model_name_or_path", model])
        self.raw, self.screen = b"", ""  # what appeared since the last key, without the codes for colour and cursor

    def type(self, keys: str) -> None:
        self.raw, self.screen = b"", ""
        os.write(self.fd, keys.encode())

    def wait_for(self, pattern: str) -> re.Match:
        end = time.monotonic() + 60
        while not (found := re.search(pattern, self.screen)):
            assert time.monotonic() < end, f"{pattern!r} did not appear. On the screen: {self.screen!r}"
            if select.select([self.fd], [], [], 1)[0]:
                self.raw += os.read(self.fd, 4096)
                self.screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode(errors="ignore"))
        return found

    def close(self) -> int:
        """Type /quit and return the exit status."""
        self.type("/quit\r")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal():
    terminal = Terminal()
    terminal.wait_for("/help lists the commands")
    terminal.type("/set do_sample False\r")  # as /knobs spells it
    yield terminal
    os.close(terminal.fd)


def test_a_message_is_answered_with_the_block_denoising_and_the_speed(terminal):
    terminal.type("Reverse the letters f h k j.\r")
    terminal.wait_for("░")
    terminal.wait_for(r"The reversed letters are j k h f\.")
    terminal.wait_for(r"\d+ tokens per second, 1\.\d tokens per forward")
    terminal.type("/set remasking_strategy low_confidence_dynamic\r/think on\r/reset\rWhat is 205 plus 849?\r")
    terminal.wait_for(r"▸ \d+ tokens of thought")
    terminal.wait_for(r"The sum is 1054\.")
    assert terminal.close() == 0


def test_ctrl_c_stops_the_answer_and_not_the_chat(terminal):
    terminal.type(
        "/set suppress_tokens [548, 550]\r/set max_new_tokens 1500\rSort the digits 85996.\r"
    )  # without an end
    terminal.wait_for("░")
    terminal.type("\x03")
    terminal.wait_for("stopped")
    terminal.type("/set suppress_tokens null\r/reset\rSort the digits 85996.\r")
    terminal.wait_for(r"The sorted digits are 56899\.")
    assert terminal.close() == 0


def test_knobs_and_bad_ones(terminal):
    terminal.type("/knobs\r")
    terminal.wait_for(r"confidence_threshold\s+0\.9")
    terminal.type("/set blok_size 3\r")
    terminal.wait_for("blok_size is no knob of generate")
    terminal.type("/set block_size 99\rSort the digits 85996.\r")
    terminal.wait_for(r"block_size=99 is outside \[1, 16\]")
    terminal.type("/set block_size 16\r/set watermarking_config 3\rSort the digits 85996.\r")
    terminal.wait_for("has no attribute")
    terminal.type("/what\r")
    terminal.wait_for(r"/set KNOB VALUE\s+change one")
    assert terminal.close() == 0


@pytest.mark.parametrize("option", ["--foo", "--model_name_or_path=nowhere"])
def test_what_it_cannot_start_with_is_a_sentence(option):
    script, model = str(ROOT / "chat_arclm.py"), str(ROOT / "nano" / "arclm-nano")
    command = [sys.executable, script, "--model_name_or_path", model, option]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "chat_arclm.py: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_line_that_is_no_text_is_refused_and_the_chat_goes_on():
    command = [sys.executable, str(ROOT / "chat_arclm.py"), "--model_name_or_path", str(ROOT / "nano" / "arclm-nano")]
    lines = b"h\xe9llo\n/set do_sample False\nSort the digits 85996.\n"
    done = subprocess.run(command, input=lines, capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(rb"The sorted digits are 56899\.\n\d+ tokens per second", done.stdout), done.stdout
