"""Benchmarks: one file per question, their results in `results/`. See README.md beside this file."""
