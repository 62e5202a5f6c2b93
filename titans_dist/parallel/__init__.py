"""Turns a model into its parallel self on megatron-core."""

import os
import warnings

# What the libraries say about themselves while they are imported, and no user can act on.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    ".*is deprecated.*",
    ".*grad attribute of a Tensor that is not a leaf.*",
):
    warnings.filterwarnings("ignore", message=_message)
# megatron-core's overlap of communication on GPUs counts on one hardware queue.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
