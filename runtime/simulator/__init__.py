"""Serving, simulated: iteration-level events under the scheduler that planc's executor runs.

Comes in: a step model, an engine's rules, a load. Goes out: the times of every request. Torch-free.
"""
