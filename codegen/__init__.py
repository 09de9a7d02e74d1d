"""How it is said: Triton kernels as readable text, engine configurations, the bundle folder.

Comes in: a `Plan`. Goes out: files. Rendering loads neither torch nor triton.
"""
