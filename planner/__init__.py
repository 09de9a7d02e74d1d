"""What should be: request -> candidates -> solver -> plan; plan schema, diff, explanation.

Comes in: a `Request` and a `CostTable`. Goes out: a `Plan`. Nothing here loads torch.
"""
