"""UL2R: continue a language model on a mixture of denoisers, show what it bought, serve it."""

__version__ = "0.1.0"
