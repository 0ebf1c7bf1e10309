"""Inspection: what a token dataset holds, shown and verified."""
