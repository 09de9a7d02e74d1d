"""What can be changed: recognise, phases, fusion, quantization, parallelism, folding.

A pass is a frozen dataclass whose fields are its options, with a `name` and one `apply(graph)`.
A decision pass also *offers* its choices, so that search and code cannot drift apart.
"""
