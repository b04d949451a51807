from __future__ import annotations

import pytest
import torch

from taps_hf.drafters.heads import expand, kept_head, topk_by_blocks

from ..tiny import tiny_drafters, tiny_target


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("draft_vocab", [None, 5])
@pytest.mark.parametrize("temperature", [None, 0.7, 2.0])
def test_expansion_against_a_direct_computation(draft_vocab, temperature):
    (drafter,) = tiny_drafters(1, draft_vocab=draft_vocab)
    head = kept_head([drafter], tiny_target())
    # Small features keep the distributions flat, so that entropies are worth comparing.
    hidden = 0.1 * torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    logits = tiny_target().get_output_embeddings()(hidden).double()
    ids = torch.arange(16) if draft_vocab is None else drafter.draft_token_ids
    p = (logits[:, ids] / (temperature or 1.0)).softmax(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = expand(head, hidden[None], 4, temperature, with_entropy=True)
    (tokens,), (log_confidence,) = found.tokens, found.log_confidence
    torch.testing.assert_close(found.entropy[0], -(p * p.log()).sum(1).float())
    full = torch.zeros(7, 16, dtype=torch.double)
    full[:, ids] = p
    torch.testing.assert_close(log_confidence.exp().double(), full.gather(1, tokens))
    if temperature is None:
        assert torch.equal(tokens, full.topk(4, dim=1).indices)
        assert found.probabilities is None
    else:
        torch.testing.assert_close(found.probabilities[0].double(), full)
    assert expand(head, hidden[None], 99).tokens.shape == (1, 7, len(ids))


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
    head = kept_head(tiny_drafters(1), tiny_target())
    hidden = torch.randn(9, 5, 32, generator=torch.Generator().manual_seed(0))
    together = expand(head, hidden, 4, with_entropy=True)
    apart = [expand(head, row[None], 4, with_entropy=True) for row in hidden]
    assert torch.equal(together.tokens, torch.cat([one.tokens for one in apart]))
    for name in ("log_confidence", "entropy"):
        found = torch.cat([getattr(one, name) for one in apart])
        torch.testing.assert_close(getattr(together, name), found)


def test_entropies_are_not_computed_unless_asked():
    head = kept_head(tiny_drafters(1), tiny_target())
    assert expand(head, torch.zeros(1, 2, 32), 3).entropy is None
