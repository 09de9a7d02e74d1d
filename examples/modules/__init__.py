"""Plain PyTorch modules to compile, named as "examples.modules.<file>:<factory>"."""
