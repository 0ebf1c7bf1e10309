"""No network for the libraries that would take data sets and models from one."""

from __future__ import annotations

import os


def go_offline() -> None:
    """Keep the Hugging Face libraries off the network, and lm-eval's bars off the terminal. To be called before they are imported."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"})
