"""What drafters are trained to minimise: EAGLE, HASS, EAGLE-3, and the registry of objectives."""

from .base import (
    DraftObjective,
    FrozenTarget,
    ObjectiveOptions,
    get_objective,
    list_objectives,
    register_objective,
)
from .eagle import Eagle, FeatureObjective, Hass
from .eagle3 import Eagle3

__all__ = [
    "DraftObjective",
    "Eagle",
    "Eagle3",
    "FeatureObjective",
    "FrozenTarget",
    "Hass",
    "ObjectiveOptions",
    "get_objective",
    "list_objectives",
    "register_objective",
]
