"""What a model is: tracing, the op dialect, graph utilities, printing, verification.

Comes in: a model source (config, module, exported program). Goes out: an executable `Graph`.
Importing this package loads no torch; `planc.ir.graph` and `planc.ir.ops` do.
"""
