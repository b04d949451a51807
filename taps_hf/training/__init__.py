"""Training of drafters: data, the target's features, objectives, the loop.

Nothing here is imported by `import taps_hf`.
"""
