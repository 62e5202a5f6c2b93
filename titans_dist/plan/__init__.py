"""What a step will take, worked out from the configuration alone: known before torch is imported."""
