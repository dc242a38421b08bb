"""Monitoring of a running study: heartbeat, metrics per epoch, profiler trace, and their readers."""
