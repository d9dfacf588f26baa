"""Benchmarks of torchext against what a user would pick instead. See README.md beside this file."""
