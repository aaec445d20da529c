"""Measures every pair of a pool, decides which to keep and why not, and checks the filters against known truth."""
