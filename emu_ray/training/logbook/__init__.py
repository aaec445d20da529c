"""Curves and sheets of pictures of a run, for people. Ray only in on_ray.py."""
