"""The official VBench package, in an environment of its own: set-up, check, scoring."""

VERSION = "vbench-0.1.5"
"""Metric version in every score this package makes."""
