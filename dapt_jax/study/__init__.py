"""Studies: strategies, target tasks, the study itself, and its plan."""
