"""What a study tells of itself while it runs: a heartbeat, metrics by epoch, a trace; and how to read them elsewhere."""
