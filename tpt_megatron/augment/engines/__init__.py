"""Engines: what a model is asked through. One file a kind; each is imported only when the config names it."""
