"""What a run is, for training and evaluation alike: its data, its folder, its identity."""
