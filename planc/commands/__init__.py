"""One module per family of commands. Each loads what it needs when it runs, not before."""
