"""How well a checkpoint will transfer, told before the target task is trained; and which checkpoint to keep."""
