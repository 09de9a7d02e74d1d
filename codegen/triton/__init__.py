"""Triton kernels from small templates with three holes: load, epilogue, store."""
