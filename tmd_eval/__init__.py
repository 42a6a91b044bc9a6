"""The evaluation suite: generation, scores, effective NFE, VBench, and the command line."""

__version__ = "0.1.0"
