"""`tpt train` under the name of Megatron-LM's script, as a file that torchrun starts.

    torchrun --nproc-per-node 8 tools/pretrain_gpt.py CONFIG.yaml [KEY=VALUE ...]

Megatron-LM's options have no place here: docs/train.md and `tpt keys train` say how settings are called.
"""

import sys

from tpt_megatron.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()
