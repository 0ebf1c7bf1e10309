"""`tpt convert` under the name and with the folders' options of Megatron-LM's tool: Hugging Face models to checkpoints, and back.

    python tools/checkpoint/convert.py --load-dir FROM --save-dir TO [--dtype bf16] [--verify]

A folder to load that has a config.json is imported, any other exported. The tool finds out what the model is, and checkpoints fit every
parallel layout, so that --model-type, --loader, --saver and target sizes have no place here.
"""

import argparse
import sys
from pathlib import Path

from tpt_megatron.cli import main


def arguments() -> list[str]:
    """Return what tpt is given in place of this script's own options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load-dir", type=Path, required=True, help="a Hugging Face model folder, a checkpoint, or a run folder")
    parser.add_argument("--save-dir", required=True, help="the folder of checkpoints, or the model folder, to make")
    args, others = parser.parse_known_args()
    direction = "import" if (args.load_dir / "config.json").is_file() else "export"
    return ["convert", direction, str(args.load_dir), args.save_dir, *others]


if __name__ == "__main__":
    sys.argv[1:] = arguments()
    main()
