"""Experiments: a matrix of students, seeds and evaluations, from one YAML file to a report."""
