"""Turns a model into its parallel self on megatron-core."""

import titans_dist.megatron  # noqa: F401  (quickens every later import of megatron-core)
