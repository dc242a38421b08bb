"""What is run: strategies, target tasks, the study itself, and its plan."""
