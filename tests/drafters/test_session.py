from __future__ import annotations

import copy

import pytest
import torch

from taps_hf import DynamicTree, EagleDrafter
from taps_hf.drafters.session import DrafterSession, topk_by_blocks

from ..tiny import prompt, tiny_drafters, tiny_target

FAMILIES = ["llama", "qwen3", "gemma3_text"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def slots(family: str = "llama", length: int = 25) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the target's features before them, as the decoding loop hands them on."""
    ids = prompt(length + 1, seed=3)
    features = tiny_target(family).base_model(ids).last_hidden_state[0]
    return ids[0, 1:], features[:-1]


def session(family: str = "llama", drafter: EagleDrafter | None = None, **kwargs) -> DrafterSession:
    drafter = drafter or tiny_drafters(1, family)[0]
    return DrafterSession([drafter], tiny_target(family), **kwargs)


def assert_trees_close(a, b):
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.parents, b.parents)
    torch.testing.assert_close(a.path_confidence, b.path_confidence, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_session_that_catches_up_late_equals_one_that_always_ran(family):
    tokens, features = slots(family)
    diligent, late = session(family), session(family)
    shape = DynamicTree(depth=3, top_k=3, num_nodes=9)
    for chunk in torch.arange(len(tokens)).split([1, 6, 1, 2, 10, 5]):
        for each in (diligent, late):
            each.observe(tokens[chunk], features[chunk])
        assert late.has_context
        (last,) = shape.grow(diligent, tokens[chunk][-1:], max_depth=3)
    assert_trees_close(*shape.grow(late, tokens[-1:], max_depth=3), last)
    # Their caches agree too: one more slot gives the same prediction.
    for each in (diligent, late):
        each.observe(tokens[:1], features[:1])
    torch.testing.assert_close(late.begin(), diligent.begin(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_end_forgets_the_tree(family):
    tokens, features = slots(family)
    drafted, undisturbed = session(family), session(family)
    for each in (drafted, undisturbed):
        each.observe(tokens[:20], features[:20])
    hidden = drafted.begin()
    undisturbed.begin()
    layer = drafted._asked.cache.cache.layers[0]
    keys, values = layer.keys.clone(), layer.values.clone()
    children = drafted.expand(hidden, 3).tokens[:, 0]
    visible = torch.eye(3, dtype=torch.bool)[None]
    hidden = drafted.step(children, hidden.expand(-1, 3, -1), visible, 1)
    drafted.step(children, hidden, torch.cat([visible, visible], dim=2), 2)
    assert layer.get_seq_length() == 20 + 6
    drafted.end()
    assert torch.equal(layer.keys, keys)
    assert torch.equal(layer.values, values)
    for each in (drafted, undisturbed):
        each.observe(tokens[20:], features[20:])
    assert torch.equal(drafted.begin(), undisturbed.begin())


def test_a_node_sees_its_own_path_only():
    tokens, features = slots()
    one, other = session(), session()
    for each in (one, other):
        each.observe(tokens, features)
    hidden = one.begin().expand(-1, 2, -1)
    other.begin()
    visible = torch.eye(2, dtype=torch.bool)[None]
    (a,) = one.step(torch.tensor([[3, 4]]), hidden, visible, 1)
    (b,) = other.step(torch.tensor([[3, 5]]), hidden, visible, 1)
    torch.testing.assert_close(a[0], b[0])
    assert not torch.allclose(a[1], b[1], atol=1e-2)


def test_a_new_session_has_no_context():
    assert not session().has_context
    each = session()
    each.observe(*slots())
    assert each.has_context
    each.begin()
    assert each.has_context


@pytest.mark.parametrize("draft_vocab", [None, 5])
@pytest.mark.parametrize("temperature", [None, 0.7, 2.0])
def test_expansion_against_a_direct_computation(draft_vocab, temperature):
    (drafter,) = tiny_drafters(1, draft_vocab=draft_vocab)
    each = session(drafter=drafter, sample_temperature=temperature, with_entropy=True)
    # Small features keep the distributions flat, so that entropies are worth comparing.
    hidden = 0.1 * torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    logits = tiny_target().get_output_embeddings()(hidden).double()
    ids = torch.arange(16) if draft_vocab is None else drafter.draft_token_ids
    p = (logits[:, ids] / (temperature or 1.0)).softmax(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = each.expand(hidden[None], 4)
    (tokens,), (log_confidence,) = found.tokens, found.log_confidence
    torch.testing.assert_close(found.entropy[0].double(), -(p * p.log()).sum(1))
    full = torch.zeros(7, 16, dtype=torch.double)
    full[:, ids] = p
    torch.testing.assert_close(log_confidence.exp().double(), full.gather(1, tokens))
    if temperature is None:
        assert torch.equal(tokens, full.topk(4, dim=1).indices)
        assert found.probabilities is None
    else:
        torch.testing.assert_close(found.probabilities[0].double(), full)
    assert each.expand(hidden[None], 99).tokens.shape == (1, 7, len(ids))


@pytest.mark.parametrize("shape", [(3000,), (5, 1024), (2, 3, 16384), (2, 100)])
@pytest.mark.parametrize("k", [1, 4, 8])
def test_topk_by_blocks_is_topk(shape, k):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(k))
    top, indices = topk_by_blocks(values, k)
    expected = values.topk(k, dim=-1)
    assert torch.equal(top, expected.values)
    assert torch.equal(indices, expected.indices)


def test_topk_by_blocks_with_equal_values():
    values = torch.randint(0, 9, (50, 2048), generator=torch.Generator().manual_seed(0)).float()
    top, indices = topk_by_blocks(values, 8)
    assert torch.equal(top, values.topk(8).values)
    assert torch.equal(values.gather(1, indices), top)
    assert all(len(set(row)) == 8 for row in indices.tolist())


def test_many_rows_are_expanded_as_each_alone():
    each = session(with_entropy=True)
    hidden = torch.randn(9, 5, 32, generator=torch.Generator().manual_seed(0))
    together = each.expand(hidden, 4)
    apart = [each.expand(row[None], 4) for row in hidden]
    assert torch.equal(together.tokens, torch.cat([one.tokens for one in apart]))
    for name in ("log_confidence", "entropy"):
        found = torch.cat([getattr(one, name) for one in apart])
        torch.testing.assert_close(getattr(together, name), found)


def test_entropies_are_not_computed_unless_asked():
    each = session()
    assert each.expand(torch.zeros(1, 2, 32), 3).entropy is None


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_and_sdpa_drafters_agree(family):
    eager = copy.deepcopy(tiny_drafters(1, family)[0])
    eager.trunk.set_attn_implementation("eager")
    assert eager.trunk.config._attn_implementation == "eager"
    tokens, features = slots(family)
    trees = []
    for each in (session(family), session(family, eager)):
        each.observe(tokens, features)
        trees += DynamicTree(depth=4, top_k=3, num_nodes=12).grow(each, tokens[-1:], 4)
    assert_trees_close(*trees)


def test_a_bfloat16_drafter_works_for_a_float32_target():
    tokens, features = slots()
    hidden = []
    for dtype in (torch.float32, torch.bfloat16):
        (drafter,) = tiny_drafters(1, dtype=dtype)
        each = session(drafter=drafter)
        each.observe(tokens, features)
        hidden.append(each.begin())
        assert hidden[-1].dtype == dtype
        assert each.expand(hidden[-1], 3).log_confidence.dtype == torch.float32
    torch.testing.assert_close(hidden[1].float(), hidden[0], rtol=0.1, atol=0.1)


def test_nothing_is_stored_on_the_models():
    (drafter,), target = tiny_drafters(1), tiny_target()
    before = [{**vars(module)} for model in (drafter, target) for module in model.modules()]
    tokens, features = slots()
    each = session()
    each.observe(tokens, features)
    DynamicTree().grow(each, tokens[-1:], 3)
    after = [vars(module) for model in (drafter, target) for module in model.modules()]
    assert [list(x) for x in after] == [list(x) for x in before]
    assert all(x[name] is y[name] for x, y in zip(after, before) for name in x)
