"""Checkpoint to Hugging Face model, tensor by tensor. `families/` holds one table a model family."""
