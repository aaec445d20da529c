"""Encoded bytes to pixels: one way for scoring, choosing and encoding, so that what is judged is what is trained on."""
