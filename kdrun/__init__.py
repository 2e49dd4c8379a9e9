"""kdrun: run knowledge-distillation experiments from config files."""

__version__ = "0.1.0"
