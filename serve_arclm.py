"""`transformers serve` for arcLM models: an OpenAI-compatible server for chat, completions and responses.

    python serve_arclm.py DIR [options of `transformers serve`]

Our knobs travel in the body of a request as the string field `generation_config`, for example
'{"max_denoising_steps": 16}'. The server is that of transformers, with five differences:

1. It finds the model's class, which it looks up by name in transformers, where one with remote code never is.
2. It reads answers as those of Qwen3.5: thoughts become `reasoning_content`, calls become `tool_calls`.
3. A name in `generation_config` that the model does not know is an error.
4. A request that `generate` refuses is answered with status 400 and its sentence, also where a stream was asked for.
5. `/v1/models` lists the model that is served.
"""

import copy
import json
import sys
from contextlib import suppress

from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.cli.serving import model_manager, server, utils
from transformers.cli.transformers import app
from transformers.utils import logging


logger = logging.get_logger("transformers.serve_arclm")

# what the functions below extend
build_generation_config = utils.BaseHandler._build_generation_config
generate_streaming = utils.GenerateManager.generate_streaming
build_server = server.build_server
list_models = model_manager.ModelManager.get_gen_models


def build_checked_generation_config(self, body: dict, model_generation_config: GenerationConfig, use_cb=False):
    """As the server does, without dropping a name that is misspelled."""
    if (text := body.get("generation_config")) is not None:
        try:
            given = dict(json.loads(text))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"generation_config must be a string with a JSON object, got {text!r}. {error}"
            ) from error
        known = vars(model_generation_config).keys()
        if unknown := sorted(given.keys() - known):
            ours = sorted(name for name in known - vars(GenerationConfig()).keys() if not name.startswith("_"))
            raise ValueError(
                f"generation_config has the unknown names {', '.join(unknown)}. "
                f"Choose among the fields of GenerationConfig and {', '.join(ours)}."
            )
        if not given.keys() & {"max_new_tokens", "max_length"}:
            # the server compares with it to say whether an answer was cut
            given["max_new_tokens"] = model_generation_config.max_new_tokens
        body = body | {"generation_config": json.dumps(given)}
    return build_generation_config(self, body, model_generation_config, use_cb=use_cb)


class AfterChecks:
    """A streamer that ends `generate` where it hands over the prompt: after its checks, before any forward pass."""

    def put(self, value):
        raise utils._GenerationCancelled


def generate_checked_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
    """Check the request before the stream begins with status 200."""
    checked = copy.copy(gen_config)
    checked.stop_strings = None  # reading the vocabulary for them takes seconds, in which no other request is served
    with suppress(utils._GenerationCancelled):
        model.generate(**inputs, generation_config=checked, streamer=AfterChecks())
    return generate_streaming(self, model, processor, inputs, gen_config, *args, **kwargs)


async def refuse(request, error: Exception):
    """Answer with the sentence of an error; the traceback is in the log, in case it was not the client's."""
    from fastapi.responses import JSONResponse

    logger.warning(f"{request.url.path} answers 400: {error}", exc_info=error)
    return JSONResponse({"detail": str(error)}, status_code=400)


def build_refusing_server(*args, **kwargs):
    """Build the server, with status 400 for what `generate` and the chat template say no to."""
    fast_api = build_server(*args, **kwargs)
    for error in (TypeError, ValueError, TemplateError):
        fast_api.add_exception_handler(error, refuse)
    return fast_api


def list_served_models(self) -> list[dict]:
    """List the one model that this server answers for; the cache is only asked where it answers for any."""
    if self.force_model is None:
        return list_models()
    return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": ""}]


def extend_server() -> None:
    """Put the five differences in place."""
    # the loader's `getattr(transformers, architecture).from_pretrained` then loads the checkpoint's own code
    model_manager.transformers.ArcLMForDiffusionLM = AutoModelForCausalLM
    templates = utils._RESPONSE_TEMPLATE_FALLBACKS
    template = copy.deepcopy(next(template for types, template in templates.items() if "qwen3_5" in types))
    # Qwen3.5's leaves the newlines around thoughts in the stream, and with them the empty think block of the prompt
    template["fields"]["reasoning_content"] = {
        "open_pattern": r"<think>\s*",
        "close_pattern": r"\s*</think>\s*",
        "content": "text",
    }
    templates[("arclm",)] = template
    utils.BaseHandler._build_generation_config = build_checked_generation_config
    utils.GenerateManager.generate_streaming = generate_checked_streaming
    server.build_server = build_refusing_server
    model_manager.ModelManager.get_gen_models = list_served_models


def main() -> None:
    """Start the server; the model's code is trusted, or this would be `transformers serve`."""
    extend_server()
    try:
        app(["serve", *sys.argv[1:], "--trust-remote-code"])
    except (ImportError, OSError, ValueError) as error:  # a package is missing, or the model
        sys.exit(f"serve_arclm.py: {error}")


if __name__ == "__main__":
    main()
