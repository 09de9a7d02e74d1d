"""The serving dialect `torch.ops.planc.*`: one file per op family, each op declared once.

Importing this package registers every op with torch.library and with `planc.ir.opdef`.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in sorted(found.name for found in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
