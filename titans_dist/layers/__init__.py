"""Layers, written once and for one process. Each class's `plan` says how its parameters may be split.

    column      nn.Linear whose outputs are split (its input is whole)
    row         nn.Linear whose inputs are split (its outputs are summed)
    heads       parameter or constant split along its first dimension, by heads
    shared      parameter that every process uses whole for its own heads (its gradients are summed)
    vocabulary  nn.Embedding split by rows
    norm        RMSNorm at the entrance of a region of column and row layers

A child or parameter that no plan names is the same on every process.
"""
