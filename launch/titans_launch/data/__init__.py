"""`titans-dist data`: what the datasets hold, and what a run reads of them."""
