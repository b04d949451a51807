"""Strategies: which drafters are asked in a cycle, and how their trees become one.

A strategy sees what the drafters propose and what happened in earlier cycles, never the target's
view of the current tree (TAPS, Proposition A.1): whatever it decides, the output stays exact.
"""

from .auto import Auto
from .base import (
    Choice,
    CycleOutcome,
    GenerationContext,
    Strategy,
    get_strategy,
    list_strategies,
    register_strategy,
)
from .merged import Merged
from .routing import Confidence, Entropy
from .single import Single

__all__ = [
    "Auto",
    "Choice",
    "Confidence",
    "CycleOutcome",
    "Entropy",
    "GenerationContext",
    "Merged",
    "Single",
    "Strategy",
    "get_strategy",
    "list_strategies",
    "register_strategy",
]
