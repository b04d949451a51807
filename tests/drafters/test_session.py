from __future__ import annotations

import copy
import functools

import pytest
import torch

from taps_hf import (
    ChainTree,
    DraftTree,
    DynamicTree,
    EagleDrafter,
    EagleDrafterConfig,
    FixedTree,
)
from taps_hf.drafters.base import DraftRequest
from taps_hf.drafters.modeling_feature import FeatureDrafter
from taps_hf.drafters.session import EagleSession

from ..tiny import DIALECTS, prompt, tiny_drafters, tiny_eagle3, tiny_target
from . import reference
from .test_modeling_eagle3 import shape_of, tensors_of

# Families of targets, and the drafter that reads several layers of one.
FAMILIES = ["llama", "qwen3", "gemma3_text", "eagle3"]
SHAPE = DynamicTree(depth=3, top_k=3, num_nodes=9)


def family_of(kind: str) -> str:
    return "llama" if kind == "eagle3" else kind


def drafter_of(kind: str) -> FeatureDrafter:
    return tiny_eagle3()[0] if kind == "eagle3" else tiny_drafters(1, kind)[0]


def slots(kind: str = "llama", length: int = 25) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the target's features before them, those of several layers side by side."""
    ids = prompt(length + 1, seed=3)
    with torch.no_grad():
        hidden = tiny_target(family_of(kind)).base_model(ids, output_hidden_states=True)
    if kind == "eagle3":  # what layer 0 gives; of the last one the model shows it normalised only
        features = torch.cat([hidden.hidden_states[1][0]] * 2, dim=-1)
    else:
        features = hidden.last_hidden_state[0]
    return ids[0, 1:], features[:-1]


def session(kind: str = "llama", drafter: FeatureDrafter | None = None) -> EagleSession:
    return EagleSession([drafter or drafter_of(kind)], tiny_target(family_of(kind)))


def observe(each: EagleSession, tokens: torch.Tensor, features: torch.Tensor) -> None:
    layers = each.drafters[0].reads_layers
    each.observe(tokens, dict(zip(layers, features.split(32, dim=-1))))


def propose(each: EagleSession, root: torch.Tensor, shape=SHAPE) -> DraftTree:
    return each.propose((0,), DraftRequest(root, shape, max_depth=9))[0]


def assert_trees_close(a: DraftTree, b: DraftTree) -> None:
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.parents, b.parents)
    torch.testing.assert_close(a.path_confidence, b.path_confidence, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_session_that_catches_up_late_equals_one_that_always_ran(family):
    tokens, features = slots(family)
    diligent, late = session(family), session(family)
    for chunk in torch.arange(len(tokens)).split([1, 6, 1, 2, 10, 5]):
        for each in (diligent, late):
            observe(each, tokens[chunk], features[chunk])
        last = propose(diligent, tokens[chunk][-1:])
    assert_trees_close(propose(late, tokens[-1:]), last)
    # Their caches agree too: one more slot gives the same tree.
    for each in (diligent, late):
        observe(each, tokens[:1], features[:1])
    assert_trees_close(propose(late, tokens[:1]), propose(diligent, tokens[:1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_are_forgotten(family):
    """Whatever has been grown meanwhile, what comes next is as if nothing had."""
    tokens, features = slots(family)
    drafted, undisturbed = session(family), session(family)
    for start, end, shape in ((0, 12, SHAPE), (12, 20, FixedTree.from_branching([4, 2, 1]))):
        observe(drafted, tokens[start:end], features[start:end])
        propose(drafted, tokens[end - 1 : end], shape)
    observe(drafted, tokens[20:], features[20:])
    observe(undisturbed, tokens, features)
    assert_trees_close(propose(drafted, tokens[-1:]), propose(undisturbed, tokens[-1:]))


def test_a_new_session_proposes_nothing():
    each = session()
    request = DraftRequest(torch.tensor([1]), SHAPE, 3)
    assert each.propose((0,), request) == {}
    each.observe(torch.tensor([1]), {})  # a text's first token: no feature precedes it
    assert each.propose((0,), request) == {}
    observe(each, *slots())
    assert each.propose((0,), request).keys() == {0}


def test_tokens_without_features_are_passed_over():
    """What an earlier turn's cache covers, and a text's first token."""
    tokens, features = slots()
    some, all_of_it = session(), session()
    observe(some, tokens[10:], features[10:])
    observe(all_of_it, tokens, features[10:])
    assert_trees_close(propose(all_of_it, tokens[-1:]), propose(some, tokens[-1:]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("run", [0, 6, 9])
def test_what_is_taken_back_is_forgotten(family, run):
    """Slots that were run and slots that are still queued; within the window of a sliding layer."""
    tokens, features = slots(family, length=9)
    undone, straight = session(family), session(family)
    if run:
        observe(undone, tokens[:run], features[:run])
        propose(undone, tokens[run - 1 : run])
    observe(undone, tokens[run:], features[run:])
    assert undone.forget(5)
    for each, start in ((undone, 4), (straight, 0)):
        observe(each, tokens[start:4], features[start:4])
        observe(each, tokens[4:7].flip(0), features[4:7])
    assert_trees_close(propose(undone, tokens[4:5]), propose(straight, tokens[4:5]))


def test_what_cannot_be_taken_back():
    tokens, features = slots()
    each = session()
    observe(each, tokens, features)
    assert not each.forget(len(tokens))  # nothing would be left
    windowed = session("gemma3_text")
    observe(windowed, tokens, features[:, :32])
    propose(windowed, tokens[-1:])
    layer = tiny_drafters(1, "gemma3_text")[0].config.layer_config["layer_types"]
    assert windowed.forget(12) == (layer != ["sliding_attention"])


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_and_sdpa_drafters_agree(family):
    eager = copy.deepcopy(drafter_of(family))
    eager.trunk.set_attn_implementation("eager")
    assert eager.trunk.config._attn_implementation == "eager"
    tokens, features = slots(family)
    trees = []
    for each in (session(family), session(family, eager)):
        observe(each, tokens, features)
        trees.append(propose(each, tokens[-1:], DynamicTree(depth=4, top_k=3, num_nodes=12)))
    assert_trees_close(*trees)


def test_a_bfloat16_drafter_works_for_a_float32_target():
    tokens, features = slots()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        each = session(drafter=tiny_drafters(1, dtype=dtype)[0])
        observe(each, tokens, features)
        found.append(propose(each, tokens[-1:], FixedTree([(0,)])))
        assert found[-1].confidence.dtype == torch.float32
    torch.testing.assert_close(found[1].confidence, found[0].confidence, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_chain_of_eagle3_is_what_the_paper_says(dialect):
    """Context of fused features, then its own states: against a forward without cache or tree."""
    (drafter,) = tiny_eagle3(dialect=dialect)
    tokens, features = slots("eagle3", length=7)
    each = session("eagle3", drafter)
    observe(each, tokens, features)
    tree = propose(each, tokens[-1:], ChainTree(4))
    tensors, shape = tensors_of(drafter), shape_of(drafter)
    embedding = tiny_target().get_input_embeddings().weight.detach()
    read = reference.fuse(tensors, shape, list(features.split(32, dim=1)))
    text, confidence = tokens.tolist(), 1.0
    for depth in range(1, 5):
        out = reference.eagle3(tensors, shape, embedding[text], read)
        odds = reference.eagle3_logits(tensors, shape, out[-1:])[0].softmax(dim=0)
        best = int(odds.argmax())
        confidence *= float(odds[best])
        text.append(int(drafter.draft_token_ids[best]))
        read = torch.cat([read, out[-1:]])
        assert tree.tokens[depth] == text[-1]
        assert abs(float(tree.path_confidence[0, depth]) - confidence) < 1e-3 * confidence


@pytest.mark.parametrize("kind", ["llama", "eagle3"])
def test_nothing_is_stored_on_the_models(kind):
    drafter, target = drafter_of(kind), tiny_target()
    before = [{**vars(module)} for model in (drafter, target) for module in model.modules()]
    tokens, features = slots(kind)
    each = session(kind)
    observe(each, tokens, features)
    propose(each, tokens[-1:])
    after = [vars(module) for model in (drafter, target) for module in model.modules()]
    assert [list(x) for x in after] == [list(x) for x in before]
    assert all(x[name] is y[name] for x, y in zip(after, before) for name in x)


@functools.cache
def windowed(size: int, kind: str = "llama") -> FeatureDrafter:
    """The first tiny drafter, which sees so many slots. Cached: do not change it."""
    drafter = copy.deepcopy(drafter_of(kind))
    drafter.config.context_window = size
    return drafter


@pytest.mark.parametrize("family", FAMILIES)
def test_behind_a_window_there_might_as_well_be_nothing(family):
    """Against a session that hears no more than the window holds."""
    tokens, features = slots(family)
    whole = session(family, windowed(8, family))
    for chunk in torch.arange(20).split([3, 12, 1, 4]):
        observe(whole, tokens[chunk], features[chunk])
        found = propose(whole, tokens[chunk][-1:])
        end = int(chunk[-1]) + 1
        known = slice(max(end - 8, 0), end)
        short = session(family)
        observe(short, tokens[known], features[known])
        assert_trees_close(found, propose(short, tokens[chunk][-1:]))


def test_a_windowed_drafter_reads_no_more_of_a_long_prompt_than_it_sees():
    tokens, features = slots()
    each = session(drafter=windowed(8))
    observe(each, tokens, features)
    propose(each, tokens[-1:])
    assert each.num_slots == 8
    assert not each.forget(8)
    wide = session(drafter=windowed(40))
    observe(wide, tokens, features)
    narrow = session()
    observe(narrow, tokens, features)
    assert_trees_close(propose(wide, tokens[-1:]), propose(narrow, tokens[-1:]))


def test_a_window_is_part_of_a_drafter(tmp_path):
    drafter = windowed(8)
    drafter.save_pretrained(tmp_path)
    assert EagleDrafter.from_pretrained(tmp_path).config.context_window == 8
    assert drafter.digest() != tiny_drafters(1)[0].digest()
    assert drafter.run_key() != tiny_drafters(1)[0].run_key()
    for wrong in (0, -1, 1.5, "8", True):
        with pytest.raises(ValueError, match="context_window"):
            EagleDrafterConfig.from_target(tiny_target().config, context_window=wrong)
