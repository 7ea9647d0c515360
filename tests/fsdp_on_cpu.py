"""train_bd3lm.py as on GPUs, with gloo on a CPU: by itself accelerate shards nothing without an accelerator."""

import torch
from accelerate.state import DistributedType, PartialState

from arclm import train_bd3lm


def main() -> None:
    """Train where accelerate takes every process for one that has a GPU."""
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    train_bd3lm.main()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
