"""Cycles as compiled graphs of fixed shapes (`generate(..., compile=True)`)."""
