"""The serving dialect `torch.ops.planc.*`: one file per op family, each op declared once.

Importing this package registers every op with torch.library and with `planc.ir.opdef`.
"""
