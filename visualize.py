"""Draw how an answer was denoised: each token in the colour of the step in which it settled, and of its confidence.

    python visualize.py --model_name_or_path nano/arclm-nano --prompt "Sort the digits 85996." --output_file answer.png

A name that ends in .png gives one picture, one in .gif an animation with a frame for every denoising step.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no display is needed

import torch
from matplotlib import pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter
from transformers import AutoModel, AutoTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg

from arclm.sampling_bd3lm import KNOBS


COLUMNS = 64  # characters of a line


@dataclass
class VisualizeArguments:
    """What to draw."""

    model_name_or_path: str = HfArg(help="A converted and trained model: a directory or a Hub id.")
    prompt: str = HfArg(help="The user's message.")
    output_file: str = HfArg(help="Name of the picture (.png) or animation (.gif).")
    think: bool = HfArg(default=False, help="Let the model think before it answers.")
    max_new_tokens: int = HfArg(default=128, help="Tokens of the answer, at most.")
    max_denoising_steps: int | None = HfArg(default=None, help="Denoising steps per block.")
    remasking_strategy: str = HfArg(default=KNOBS["remasking_strategy"], help="Which tokens a step accepts.")


@dataclass
class Settled:
    """A token of the answer: its text, the denoising step (from 0) it settled in, and its probability there."""

    text: str
    step: int
    confidence: float


@torch.no_grad()
def trace(model, tokenizer, prompt_ids: torch.Tensor, **knobs) -> list[Settled]:
    """Generate greedily after `prompt_ids` [1, P], then read the confidence of each accepted token.

    Every state that the sampler saw is given to the model again, over the same cache: denoising steps repeat exactly.
    A token that no step accepted, because it follows an accepted end token, is not part of the answer.
    """
    if (prompt_ids == model.config.mask_token_id).any():
        raise ValueError("The prompt holds mask tokens, and only what follows a prompt can be drawn. Leave them out.")
    output = model.generate(prompt_ids, do_sample=False, return_dict_in_generate=True, **knobs)
    mask, size, prompt = model.config.mask_token_id, output.history[0].shape[1], prompt_ids.shape[1]
    start = prompt // size * size
    cache = model(prompt_ids[:, :start], use_cache=True, block_size=size).past_key_values if start else None
    before = torch.full((1, size), mask)
    before[0, : prompt - start] = prompt_ids[0, start:]
    steps: dict[int, tuple[int, float]] = {}
    for step, block in enumerate(output.history):
        logits = model(noisy_input_ids=before, past_key_values=cache, block_size=size).logits[0].float()
        logits[:, mask] = -torch.inf
        probs = logits.softmax(-1)
        for i in ((before == mask) & (block != mask))[0].nonzero()[:, 0].tolist():
            steps[start + i] = (step, probs[i, block[0, i]].item())
        before = block
        if not (block == mask).any():
            cache = model(block, past_key_values=cache, use_cache=True, block_size=size).past_key_values
            start, before = start + size, torch.full((1, size), mask)
    answer = output.sequences[0, prompt:].tolist()
    return [Settled(tokenizer.decode([token]), *steps[prompt + i]) for i, token in enumerate(answer)]


def layout(tokens: list[Settled]) -> tuple[list[tuple[int, int, str]], int, int]:
    """Return line, column and shown text of each token, the number of lines, and the characters of the longest."""
    places, line, column = [], 0, 0
    for token in tokens:
        text = token.text.replace("\n", "⏎")
        if column and column + len(text) > COLUMNS:
            line, column = line + 1, 0
        places.append((line, column, text))
        column += len(text)
        if token.text.endswith("\n"):
            line, column = line + 1, 0
    width = max(column + len(text) for _, column, text in places)
    return places, line + 1, width


def draw(axes, tokens: list[Settled], values: list[float], until: int, title: str, top: float) -> None:
    """Draw the tokens that settled up to step `until` on a background of their value in [0, top]; the others as ░."""
    places, lines, width = layout(tokens)
    axes.set(xlim=(0, width), ylim=(lines, 0))
    axes.set_title(title, loc="left", fontsize=9)
    axes.axis("off")
    for (line, column, text), token, value in zip(places, tokens, values, strict=True):
        is_settled = token.step <= until
        colour = plt.get_cmap("viridis")(value / top) if is_settled else "#eeeeee"
        axes.add_patch(plt.Rectangle((column, line + 0.05), len(text), 0.9, color=colour, linewidth=0))
        dark = is_settled and value < 0.6 * top
        shown = text if is_settled else "░" * len(text)
        for i, letter in enumerate(shown):
            axes.text(
                column + i + 0.5, line + 0.55, letter, ha="center", va="center", family="monospace", fontsize=8,
                color="white" if dark else "black",
            )  # fmt: skip


def save(tokens: list[Settled], path: Path) -> None:
    """Write the picture, or the animation."""
    last = max(token.step for token in tokens)
    _, lines, width = layout(tokens)
    width = max(5, 0.13 * width)  # inches; the titles need five
    steps = [token.step for token in tokens]
    if path.suffix == ".png":
        figure, axes = plt.subplots(2, 1, figsize=(width, 1 + 0.5 * lines))
        draw(axes[0], tokens, steps, last, f"denoising step in which a token settled (0 to {last})", max(last, 1))
        confidences = [token.confidence for token in tokens]
        draw(axes[1], tokens, confidences, last, "confidence when it settled (dark 0, bright 1)", 1.0)
        figure.savefig(path, dpi=110, bbox_inches="tight")
    else:
        figure, axes = plt.subplots(figsize=(width, 0.6 + 0.25 * lines))

        def frame(step: int) -> None:
            axes.clear()
            draw(axes, tokens, steps, step, f"denoising step {step} of {last}", max(last, 1))

        # the last frame stays for a second
        FuncAnimation(figure, frame, [*range(last + 1), *[last] * 4]).save(path, PillowWriter(fps=4), dpi=80)
    plt.close(figure)


def main() -> None:
    """Load, generate, draw."""
    args = HfArgumentParser(VisualizeArguments).parse_args_into_dataclasses()[0]
    path = Path(args.output_file)
    if path.suffix not in (".png", ".gif"):
        raise ValueError(f"{path} ends in neither .png nor .gif. Give it one of these endings.")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no directory. Make it, or choose another --output_file.")
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=True)
    model = AutoModel.from_pretrained(args.model_name_or_path, trust_remote_code=True, dtype=torch.float32)
    if model.config.model_type != "arclm":
        raise ValueError(f"{args.model_name_or_path} is not an arcLM model. convert_a2d.py makes one.")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": args.prompt}],
        add_generation_prompt=True,
        enable_thinking=args.think,
        return_dict=True,
        return_tensors="pt",
    )
    knobs = {name: getattr(args, name) for name in ("max_new_tokens", "max_denoising_steps", "remasking_strategy")}
    save(trace(model, tokenizer, inputs["input_ids"], **knobs), path)
    print(f"Wrote {path}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"visualize.py: {error}")
