"""Preprocess: documents with thoughts in, one Megatron token dataset an arm out."""
