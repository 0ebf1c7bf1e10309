"""Sequences: which documents every training sequence is made of, as a function of config, datasets, seed and its number."""
