"""Measuring the machine at hand: micro-benchmarks, an engine's host time, and the profile they make.

Comes in: the local device, an environment with an engine where one is named. Goes out: a
`planc.cost_model.calibration.ProfileDocument`. `worker.py` is the only file that touches the device.
"""
