"""Predicted against measured: serving points, the harness that took them, errors, fitted constants.

Comes in: a CSV of measured points. Goes out: predictions with bands, errors by group, engine constants.
Nothing here loads torch.
"""
