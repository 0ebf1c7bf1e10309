"""`tpt preprocess` under the name and with the main options of Megatron-LM's tool: JSON lines to .bin and .idx.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data --tokenizer-model TOKENIZER --append-eod [KEY=VALUE ...]

The same bytes as Megatron-LM's go to OUTPUT_PREFIX/vanilla/train.bin and .idx, which train as data.train=OUTPUT_PREFIX/vanilla/train; sidecars and a
manifest lie beside them. Everything else that tpt preprocess can do is KEY=VALUE: `tpt keys preprocess` lists it.
"""

import argparse
import json
import sys
import tempfile
from typing import IO

from tpt_megatron.cli import main


def arguments(config: IO[str]) -> list[str]:
    """Return what tpt is given in place of this script's own options, which go into a config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="record files, folders or globs")
    parser.add_argument("--output-prefix", required=True, help="the folder to make")
    parser.add_argument("--tokenizer-model", required=True, help="a folder with tokenizer.json or tokenizer.model, or one of these files")
    parser.add_argument("--append-eod", required=True, action="store_true", help="required, because every document ends with end_of_document=<|endoftext|>")
    parser.add_argument("--json-keys", nargs=1, default=["text"], help="the one key that has the text (default: text)")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine (default: 1)")
    args, others = parser.parse_known_args()
    settings = {
        "input": args.input,
        "output": args.output_prefix,
        "tokenizer": args.tokenizer_model,
        "fields": {"text": args.json_keys[0]},
        "workers": args.workers,
        "arms": ["vanilla"],
    }
    json.dump(settings, config)
    config.flush()
    return ["preprocess", config.name, *others]


if __name__ == "__main__":  # workers import this file once more
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        sys.argv[1:] = arguments(file)
        main()
