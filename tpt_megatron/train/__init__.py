"""The trainer: loop, schedule, data order, metrics, signals. What happens when; mcore says how."""
