"""Measurements: `python -m benchmarks.NAME [--quick]` runs both sides in one run; the last line is one JSON object of ratios."""
