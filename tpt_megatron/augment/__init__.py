"""Augment: documents in, documents with thoughts out; one shard an input file, and a run that was cut off goes on."""
