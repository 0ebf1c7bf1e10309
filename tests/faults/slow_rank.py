"""`tpt train` as one rank under torchrun; on rank 1 each forward pass takes a tenth of a second longer. Started by test_stragglers.py."""

import os
import time
from typing import Any

from megatron.core.models.gpt import GPTModel

from tpt_megatron.cli import main

forward = GPTModel.forward


def slow_forward(model: GPTModel, *arguments: Any, **named: Any) -> Any:
    time.sleep(0.1)
    return forward(model, *arguments, **named)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        GPTModel.forward = slow_forward
    main()
