"""The only room that imports megatron and transformer_engine: how a step is computed, on CUDA and on CPU.

Importing this room readies megatron-core for the machine: `cuda.adapt`, or `cpu.adapt` where there is none, has run before any
other module here is loaded, in this process and in every process that megatron-core spawns from it.
"""

import logging
import os
import sys
import warnings

import torch

# Its import warns of every optional package that is missing on a CPU; what a run needs is checked by name instead.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not torch.cuda.is_available():
        # megatron-core takes kernels from these wherever they are installed, also where their CUDA cannot run.
        for name in ("transformer_engine", "apex"):
            sys.modules[name] = None  # type: ignore[assignment]  # whoever imports it is told that it is missing
    import megatron.core  # noqa: F401 - first, so that its warnings stay here

    from tpt_megatron.mcore import cpu, cuda

    (cuda if torch.cuda.is_available() else cpu).adapt()

# Notes on calls that megatron-core and torch make of each other: nothing a user could mend.
for module in (r"megatron\.core\.", r"torch\.distributed\."):
    warnings.filterwarnings("ignore", module=module)
logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
