"""Strategies: which drafters are asked in a cycle, and how their trees become one.

A strategy sees what the drafters propose and what happened in earlier cycles, never the target's
view of the current tree (TAPS, Proposition A.1): whatever it decides, the output stays exact.
"""

from .base import Choice, CycleOutcome, Strategy, get_strategy, list_strategies, register_strategy
from .merged import Merged
from .routing import Confidence, Entropy
from .single import Single

__all__ = [
    "Choice",
    "Confidence",
    "CycleOutcome",
    "Entropy",
    "Merged",
    "Single",
    "Strategy",
    "get_strategy",
    "list_strategies",
    "register_strategy",
]
