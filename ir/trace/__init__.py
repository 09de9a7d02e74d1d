"""Doors into the IR: Hugging Face configs, nn.Modules, exported programs, symbolic traces."""
