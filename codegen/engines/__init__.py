"""One module per engine: how a plan's settings are written in that engine's own configuration."""
