"""Benchmarks through lm-eval: the paper's protocol on local files, thoughts understood, killed runs continued."""
