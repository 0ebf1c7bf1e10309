"""The demonstration: the whole road, small, on this machine."""
