"""For every room: quiet torch's structured trace log, which pytest would otherwise collect."""

import logging

logging.getLogger("torch.__trace").propagate = False
