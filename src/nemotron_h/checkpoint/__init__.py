"""Checkpoints: files that are read strictly and written atomically, and the names of their tensors.

This layer yields (name, tensor); it knows configs, not modules.
"""
