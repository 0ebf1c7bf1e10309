"""Arms of an experiment side by side: scores at equal tokens, how many tokens each needs, and a report to show."""
