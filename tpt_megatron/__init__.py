"""Thinking-augmented pretraining on megatron-core (arXiv 2509.20186).

The stages, in the data's order; each reads files that the one before wrote:

    augment      documents            -> documents with thoughts (JSONL)
    preprocess   augmented documents  -> token datasets, one an arm (.bin .idx and sidecars)
    train        token datasets       -> checkpoints (megatron-core torch_dist) and metrics.jsonl
    convert      checkpoints         <-> Hugging Face model folders
    evaluate     models               -> scores
    compare      runs                 -> report: does the thinking pay?

Below them: mcore (the only room that imports megatron), tokenizer, records, files, config, errors, log.
"""

__version__ = "0.1.0"
