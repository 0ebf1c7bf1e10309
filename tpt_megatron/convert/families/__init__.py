"""One file a model family: how its Hugging Face tensors are made from a checkpoint's."""
