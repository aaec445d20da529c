"""A training set larger than memory: read in windows by Ray Data, in an order that is a function of (seed, images seen). Ray only in on_ray.py."""
