"""The base that the demo starts from: small networks made by the project's own recipes on separate draws of the haystack.

Draws are told apart by their seed, so that no stage of the demo ever sees a picture that a judge or a scorer was fitted on.
"""
