"""Pictures to raw latents: what training reads instead of pixels. Ray only in on_ray.py."""
