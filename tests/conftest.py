"""For every room: steady hypothesis examples, and no structured trace log of torch's.

`make test` draws the same examples each time. HYPOTHESIS_PROFILE=explore draws new ones.
"""

import logging
import os

from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

logging.getLogger("torch.__trace").propagate = False
