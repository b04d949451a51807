"""Speculative decoding with several specialised drafters for Hugging Face transformers.

Importing this package teaches `generate` the argument `assistant_models` (undo: [`disable`]):

    import taps_hf

    math = taps_hf.EagleDrafter.from_pretrained("path/or/hub-name")
    chat = taps_hf.EagleDrafter.from_pretrained("path/or/hub-name")
    target.generate(**inputs, assistant_models=[math, chat])
"""

from .cache import crop_to_shared
from .candidate_generator import TreeCandidateGenerator
from .drafters.averaging import average_drafters
from .drafters.base import Drafter, DrafterSession, DraftRequest
from .drafters.causal import CausalDrafter
from .drafters.configuration_eagle import EagleDrafterConfig, tokenizer_fingerprint
from .drafters.configuration_eagle3 import Eagle3DrafterConfig
from .drafters.lookup import PromptLookup
from .drafters.memory import AnswerMemory
from .drafters.modeling_eagle import EagleDrafter
from .drafters.modeling_eagle3 import Eagle3Drafter
from .extension import disable, enable, is_enabled
from .generation import SpeculativeDecoding
from .loading import load_drafter
from .measuring import measure_costs
from .strategies import (
    Auto,
    Choice,
    Confidence,
    CycleOutcome,
    Entropy,
    GenerationContext,
    Merged,
    Single,
    Strategy,
    get_strategy,
    list_strategies,
    register_strategy,
)
from .strategies.costs import Costs, DraftCost, LearntCosts
from .target import LAST
from .trace import CycleTrace, DraftTrace, EmittedToken, SpeculativeDecoderOnlyOutput
from .trees.shapes import ChainTree, DynamicTree, FixedTree, TreeShape
from .trees.tree import DraftTree, SampledProposals, concatenate, merge
from .version import __version__

__all__ = [
    "LAST",
    "AnswerMemory",
    "Auto",
    "CausalDrafter",
    "ChainTree",
    "Choice",
    "Confidence",
    "Costs",
    "CycleOutcome",
    "CycleTrace",
    "DraftCost",
    "DraftRequest",
    "DraftTrace",
    "DraftTree",
    "Drafter",
    "DrafterSession",
    "DynamicTree",
    "Eagle3Drafter",
    "Eagle3DrafterConfig",
    "EagleDrafter",
    "EagleDrafterConfig",
    "EmittedToken",
    "Entropy",
    "FixedTree",
    "GenerationContext",
    "LearntCosts",
    "Merged",
    "PromptLookup",
    "SampledProposals",
    "Single",
    "SpeculativeDecoderOnlyOutput",
    "SpeculativeDecoding",
    "Strategy",
    "TreeCandidateGenerator",
    "TreeShape",
    "__version__",
    "average_drafters",
    "concatenate",
    "crop_to_shared",
    "disable",
    "enable",
    "get_strategy",
    "is_enabled",
    "list_strategies",
    "load_drafter",
    "measure_costs",
    "merge",
    "register_strategy",
    "tokenizer_fingerprint",
]

enable()
