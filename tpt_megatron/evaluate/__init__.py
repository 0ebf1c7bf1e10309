"""Scores of a model, or of every checkpoint of a run, on problems with checkable answers."""
