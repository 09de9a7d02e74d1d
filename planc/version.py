"""The version of planc and of the documents it writes."""

__version__ = "0.1.0"

#: Version of `plan.json`. A bundle with a larger one is refused, never guessed at.
SCHEMA_VERSION = 1
