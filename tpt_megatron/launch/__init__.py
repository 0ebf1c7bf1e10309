"""Before and around a run on many machines: what it will take, and how it is started, stopped and started again."""
