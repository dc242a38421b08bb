"""How one run trains: phases, masks, steps, the loop, cached prefixes, checkpoints, and what it costs."""
