"""Phases, masks, steps, cached prefixes, the loop and its checkpoints: how a network is trained, and what that costs."""
