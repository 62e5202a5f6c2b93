"""Turns a model into its parallel self on megatron-core."""
