"""The mathematics of diffusion: noise schedule, objectives and their weights. Torch only; no model, no data, no Ray."""
