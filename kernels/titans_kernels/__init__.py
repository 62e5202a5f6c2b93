"""Triton kernels of the neural memory and of the layer around it; torch and triton are all they need."""
