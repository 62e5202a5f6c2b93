"""`titans-dist checkpoint`: what the checkpoints of a run hold, and what can be made of them."""
