"""Measuring drafters: records of the target, replay, live runs, tables and figures.

Nothing here is imported by `import taps_hf`.
"""
