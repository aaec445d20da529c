"""The haystack: an embedded world of captioned scenes in which photographic quality is a known quantity.

It exists so that a machine without a network can run, and check, the whole way from a raw pool to a quality-tuned model.
It is no data set for a product: real pools enter by `emu_ray.ingest`.
"""
