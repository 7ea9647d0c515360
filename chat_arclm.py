"""Chat with an arcLM model in a terminal and watch its blocks denoise.

    python chat_arclm.py --model_name_or_path DIR

A line is a message; /help lists the commands. Ctrl-C stops an answer, Ctrl-D or /quit ends the chat.
"""

import json
import signal
import sys
import time
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import AutoModel, AutoTokenizer, GenerationConfig, HfArgumentParser, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from arclm.sampling_bd3lm import KNOBS


HELP = {
    "/help": "this list",
    "/knobs": "the knobs of generate and their values",
    "/set KNOB VALUE": "change one, for example /set confidence_threshold 0.7",
    "/think on|off": "let the model think before it answers",
    "/reset": "forget the chat",
    "/quit": "end",
}
THINK_END = "</think>"
# shown by /knobs; /set takes every field of GenerationConfig
SHOWN = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", *KNOBS)


@dataclass
class ChatArguments:
    """Whom to chat with."""

    model_name_or_path: str = HfArg(help="Model that convert_a2d.py and train_bd3lm.py made: a directory or a Hub id.")
    device: str = HfArg(default="cuda" if torch.cuda.is_available() else "cpu", help="Device to run on.")
    think: bool = HfArg(default=False, help="Let the model think before it answers.")


class Draft:
    """A streamer that redraws the answer after every denoising step.

    Fields:
        settled: ids of the finished blocks.
        draft: ids of the block being denoised, mask tokens among them.
        stopped: whether Ctrl-C was pressed, which ends the answer at the next step.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, live: Live, thinking: bool) -> None:
        self.tokenizer, self.live, self.thinking = tokenizer, live, thinking
        self.settled: list[int] = []
        self.draft: list[int] = []
        self.is_prompt, self.stopped = True, False

    def stop(self, *_) -> None:
        """Take Ctrl-C. Raised wherever it comes, a library could swallow it."""
        self.stopped = True

    def update(self) -> None:
        """Redraw, or end the answer if it was stopped."""
        if self.stopped:
            raise KeyboardInterrupt
        self.live.update(self.render())

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then the tokens of each finished block."""
        if not self.is_prompt:
            self.settled += value.tolist()
            self.draft = []
        self.is_prompt = False
        self.update()

    def put_draft(self, value: torch.Tensor) -> None:
        """Take the block after a denoising step."""
        self.draft = value.tolist()
        self.update()

    def end(self) -> None:
        """Draw the whole answer."""
        self.live.update(self.render(), refresh=True)

    def split(self, ids: list[int]) -> tuple[str, str]:
        """Return the thoughts and the answer in `ids`, mask tokens as one shaded cell each."""
        special = {*self.tokenizer.all_special_ids} - {self.tokenizer.mask_token_id}
        text = self.tokenizer.decode([i for i in ids if i not in special])
        thoughts, end, answer = text.replace(self.tokenizer.mask_token, "░").rpartition(THINK_END)
        if not end and self.thinking:
            return answer, ""
        return thoughts, answer.lstrip("\n")

    def render(self) -> Text:
        """Draw thoughts as one folded line once they are complete, and the answer."""
        thoughts, answer = self.split(self.settled + self.draft)
        text = Text()
        if thoughts.strip():
            folded = f"▸ {len(self.tokenizer.tokenize(thoughts))} tokens of thought"
            text.append(f"{folded if answer else thoughts.strip()}\n", style="dim italic")
        return text.append(answer)


class Chat:
    """The messages so far, the knobs, and what each line of input does."""

    def __init__(self, model, tokenizer: PreTrainedTokenizerBase, console: Console, think: bool) -> None:
        self.model, self.tokenizer, self.console, self.think = model, tokenizer, console, think
        self.config = GenerationConfig.from_dict(model.generation_config.to_dict())
        self.messages: list[dict] = []

    def take(self, line: str) -> bool:
        """Handle one line; returns whether the chat goes on."""
        command, *rest = line.split(maxsplit=2) if line.startswith("/") else ("",)
        if command == "/quit":
            return False
        if command == "/reset":
            self.messages = []
        elif command == "/think" and rest in (["on"], ["off"]):
            self.think = rest == ["on"]
        elif command == "/knobs":
            self.show({name: str(getattr(self.config, name, None)) for name in SHOWN})
        elif command == "/set" and len(rest) == 2:
            self.set_knob(*rest)
        elif command:
            self.show(HELP)
        elif line.strip():
            self.answer(line)
        return True

    def show(self, rows: dict[str, str]) -> None:
        """Print names and what they mean."""
        table = Table(box=None, show_header=False)
        for row in rows.items():
            table.add_row(*row)
        self.console.print(table)

    def set_knob(self, name: str, value: str) -> None:
        """Change a knob; `generate` checks its value at the next message."""
        if name not in self.config.to_dict():
            self.console.print(f"{name} is no knob of generate. /knobs lists them.", style="red")
            return
        value = {"True": "true", "False": "false", "None": "null"}.get(value, value)  # as /knobs spells them
        try:
            setattr(self.config, name, json.loads(value))
        except ValueError:  # a name such as low_confidence_dynamic
            setattr(self.config, name, value)

    def answer(self, line: str) -> None:
        """Generate the answer to a message; an interrupted or impossible one leaves the chat as it was."""
        messages = [*self.messages, {"role": "user", "content": line}]
        with Live(console=self.console, refresh_per_second=20) as live:
            draft = Draft(self.tokenizer, live, self.think)
            before = signal.signal(signal.SIGINT, draft.stop)
            try:
                knobs = {"enable_thinking": self.think, "return_dict": True, "return_tensors": "pt"}
                inputs = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **knobs)
                start = time.perf_counter()
                config = GenerationConfig.from_dict(self.config.to_dict() | {"return_dict_in_generate": True})
                output = self.model.generate(
                    **inputs.to(self.model.device), generation_config=config, streamer=draft, tokenizer=self.tokenizer
                )
            except KeyboardInterrupt:
                live.console.print("stopped", style="yellow")
                return
            # a knob that does not fit, or a message that is no text
            except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError, TemplateError) as error:
                live.console.print(str(error), style="red")
                return
            finally:
                signal.signal(signal.SIGINT, before)
        seconds = time.perf_counter() - start
        thoughts, answer = draft.split(draft.settled)
        self.messages = [*messages, {"role": "assistant", "content": answer, "reasoning_content": thoughts.strip()}]
        speed = f"{len(draft.settled) / seconds:.0f} tokens per second"
        if not self.console.is_terminal:  # where rich leaves the last line open
            self.console.print()
        self.console.print(f"{speed}, {output.tokens_per_forward[0]:.1f} tokens per forward", style="dim")


def main() -> None:
    """Load the model and chat."""
    console = Console()
    try:
        args = HfArgumentParser(ChatArguments).parse_args_into_dataclasses()[0]
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=True)
        model = AutoModel.from_pretrained(args.model_name_or_path, trust_remote_code=True, dtype="auto")
        model = model.to(args.device)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:  # the last two: no such device
        sys.exit(f"chat_arclm.py: {error}")
    if model.config.model_type != "arclm":
        sys.exit(f"chat_arclm.py: {args.model_name_or_path} is not an arcLM model. convert_a2d.py makes one.")
    chat = Chat(model, tokenizer, console, args.think)
    console.print("/help lists the commands.", style="dim")
    while True:
        try:
            if not chat.take(console.input("[bold]> ")):
                return
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print()  # a half-typed line is dropped, the chat goes on


if __name__ == "__main__":
    main()
