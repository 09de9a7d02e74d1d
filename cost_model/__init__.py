"""What things cost: hardware catalogue, operator, collective, memory and energy costs.

Comes in: a `CostTable` (rows of work) and a hardware entry. Goes out: seconds, bytes, joules,
each with its provenance and band. Nothing here loads torch.
"""
