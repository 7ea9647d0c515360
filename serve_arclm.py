"""`transformers serve` for arcLM models: an OpenAI-compatible server for chat, completions and responses.

    python serve_arclm.py DIR [options of `transformers serve`]

The server of transformers looks a model's class up by name among its own, where one with remote code never is. This
starts the same server with a loader that asks `AutoModelForCausalLM`. Our knobs travel in the body of a request as the
string field `generation_config`, for example '{"max_denoising_steps": 16}'.
"""

import sys

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.transformers import app


def load_model(self, model_id_and_revision: str, tqdm_class=None, progress_callback=None, gguf_file=None):
    """Load as `ModelManager._load_model`, through the auto class of the checkpoint where it has one."""
    model_id, revision = model_id_and_revision.split("@", 1)
    options = {"revision": revision, "trust_remote_code": self.trust_remote_code}
    auto_map = getattr(AutoConfig.from_pretrained(model_id, **options), "auto_map", None) or {}
    if "AutoModelForCausalLM" not in auto_map:
        return load_model.original(self, model_id_and_revision, tqdm_class, progress_callback, gguf_file)
    options |= {"dtype": self.dtype, "device_map": self.device, "attn_implementation": self.attn_implementation}
    return AutoModelForCausalLM.from_pretrained(model_id, **options)


def main() -> None:
    """Start the server with our loader; the model's code is trusted, or this would be `transformers serve`."""
    load_model.original, ModelManager._load_model = ModelManager._load_model, load_model
    try:
        app(["serve", *sys.argv[1:], "--trust-remote-code"])
    except ImportError as error:  # the packages of the server
        sys.exit(f"serve_arclm.py: {error}")


if __name__ == "__main__":
    main()
