"""Whose token is proposed, against softmax written out."""

from __future__ import annotations

import pytest
import torch

from taps_hf.serving.routing import (
    Best,
    Evidence,
    Router,
    Slots,
    Trust,
    best_tokens,
    of_chosen,
    surest,
)

LOGITS = torch.tensor(
    [  # two drafters, three rows, four tokens
        [[4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.5], [0.0, 9.0, 0.0, 0.0]],
        [[9.0, 9.0, 9.0, 9.0], [0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 9.0, 0.0]],
    ]
)
IDS = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])


def test_the_likeliest_token_and_how_likely():
    best = best_tokens(LOGITS, IDS)
    assert best.tokens.tolist() == [[10, 13, 11], [20, 22, 22]]
    expected = LOGITS.softmax(dim=-1).amax(dim=-1)
    torch.testing.assert_close(best.confidences.exp(), expected)
    assert best_tokens(LOGITS, None).tokens.tolist() == [[0, 3, 1], [0, 2, 2]]


def test_tokens_that_are_not_scored_count_for_nothing():
    short = LOGITS.clone()
    short[1, :, 3] = -torch.inf
    best = best_tokens(short, IDS)
    torch.testing.assert_close(best.confidences[1, 0].exp(), torch.tensor(1 / 3))
    assert best.tokens[1].tolist() == [20, 22, 22]


def test_larger_logits_are_no_surer():
    """The second drafter has the larger ones in the first row, and no preference; ties go first."""
    best = best_tokens(LOGITS, IDS)
    drafters = surest(best)
    assert drafters.tolist() == [0, 1, 0]
    assert of_chosen(best.tokens, drafters).tolist() == [10, 22, 11]
    assert torch.equal(of_chosen(LOGITS, drafters), LOGITS[drafters, torch.arange(3)])


def test_evidence_of_a_request_is_summed_until_it_is_forgotten():
    evidence = Evidence(2, 3, "cpu")
    slots = torch.tensor([2, 0])
    first = Best(torch.zeros(2, 2, dtype=torch.int64), torch.tensor([[-3.0, -1.0], [-1.0, -2.0]]))
    assert evidence.surest(first, slots).tolist() == [1, 0]
    # The first drafter is surer now, but not in sum; in the other request it is.
    later = Best(first.tokens, torch.tensor([[-1.0, -1.0], [-2.0, -1.5]]))
    assert surest(later).tolist() == [0, 0]
    assert evidence.surest(later, slots).tolist() == [1, 0]
    evidence.forget(torch.tensor([2]))
    assert evidence.surest(later, slots).tolist() == [0, 0]


def test_who_was_right_of_late_is_trusted():
    """Against the rule written out: confidence times the square of a fading count."""
    trust, rng = Trust(2, 3, "cpu"), torch.Generator().manual_seed(0)
    right = [[Trust.BEFORE / 2] * 2 for _ in range(3)]
    for step in range(60):
        slots = torch.randperm(3, generator=rng)[:2]
        if step == 30:  # another request begins there
            trust.forget(slots[:1])
            right[slots[0]] = [Trust.BEFORE / 2] * 2
        foreseen = torch.randint(4, (2, 2), generator=rng)
        emitted = torch.randint(4, (2,), generator=rng)
        trust.hear(slots, foreseen, emitted)
        for row, slot in enumerate(slots.tolist()):
            for k in range(2):
                hit = float(foreseen[k, row] == emitted[row])
                right[slot][k] = Trust.KEPT * right[slot][k] + hit
        confidences = torch.rand(2, 2, generator=rng)
        found = trust.surest(Best(foreseen, confidences.log()), slots)
        for row, slot in enumerate(slots.tolist()):
            first, second = (float(confidences[k, row]) * right[slot][k] ** 2 for k in range(2))
            assert abs(first - second) > 1e-6
            assert int(found[row]) == int(second > first)


def test_new_requests_trust_nobody_more():
    """Confidences alone decide, until somebody has been right more often."""
    trust, slots = Trust(2, 1, "cpu"), torch.tensor([0])
    heard = Best(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[0.3], [0.4]]).log())
    assert trust.surest(heard, slots).tolist() == [1]
    for _ in range(3):
        trust.hear(slots, torch.tensor([[5], [6]]), torch.tensor([5]))
    assert trust.surest(heard, slots).tolist() == [0]
    trust.forget(slots)
    assert trust.surest(heard, slots).tolist() == [1]


def test_requests_keep_their_slots_while_they_are_there():
    slots, alive = Slots(3), set("abcdefghi")
    first, new = slots.of(["a", "b"], alive)
    assert len(set(first)) == 2
    assert new == first
    again, new = slots.of(["b", "c"], alive)
    assert again[0] == first[1]
    assert new == [again[1]]
    assert slots.of(["a"], alive)[0] == first[:1]  # it was only not in a batch
    others, new = slots.of(["d", "e", "a"], alive)
    assert new == others[:2]
    assert others[2] == first[0]
    assert sorted(others) == [0, 1, 2]
    with pytest.raises(ValueError, match="4 requests are in the batch, expected at most 3"):
        slots.of(["f", "g", "h", "i"], alive)


def test_nothing_is_kept_of_requests_that_have_ended():
    slots = Slots(3)
    slots.of(["a", "b"], {"a", "b"})
    (place,), new = slots.of(["b"], {"b", "c"})
    assert (set(slots), new) == ({"b"}, [])
    others, new = slots.of(["c", "b"], {"b", "c"})
    assert new == [others[0]]
    assert others[1] == place
    slot, new = slots.of(["a"], {"a", "b"})  # ended before, and back under its old name
    assert new == slot
    assert set(slots) == {"a", "b"}


def said(*each: list[tuple[int, float]]) -> Best:
    """By drafter and row: a token and its probability."""
    tokens = torch.tensor([[token for token, _ in rows] for rows in each])
    return Best(tokens, torch.tensor([[sure for _, sure in rows] for rows in each]).log())


def router(**more: bool) -> Router:
    found = Router("draft", 2, 4, "cpu", **more)
    found.follow(torch.tensor([0, 1]), torch.tensor([0, 1]))
    return found


def test_a_draft_is_one_drafters_and_it_is_alone_if_it_is_everybodys():
    found = router(can_be_alone=True)
    found.begin()
    found.choose(said([(1, 0.9), (2, 0.2)], [(3, 0.5), (4, 0.6)]))
    assert (found.picks.tolist(), found.chosen.tokens.tolist()) == ([0, 1], [1, 4])
    assert found.alone is None
    found.choose(said([(5, 0.1), (6, 0.9)], [(7, 0.9), (8, 0.1)]))  # the same two
    assert found.chosen.tokens.tolist() == [5, 8]
    found.begin()
    found.choose(said([(1, 0.9), (2, 0.8)], [(3, 0.5), (4, 0.6)]))
    assert found.alone == 0
    found.choose(said([(5, 0.1), (6, 0.2)]))  # it alone says something
    assert found.picks.tolist() == [0, 0]
    assert found.chosen.tokens.tolist() == [5, 6]
    torch.testing.assert_close(found.chosen.confidences.exp(), torch.tensor([0.1, 0.2]))
    assert found.rest() is None


def offer(*rows: list[tuple[int, float]]) -> Best:
    """By row, token by token; a token -1 is none."""
    tokens = torch.tensor([[token for token, _ in row] for row in rows])
    return Best(tokens, torch.tensor([[sure for _, sure in row] for row in rows]).log())


def test_what_is_looked_up_is_taken_as_far_as_it_goes():
    found = router(can_be_alone=True, lookup=True)
    found.begin(offer([(10, 0.95), (11, 0.9), (-1, 0.0)], [(12, 0.1), (13, 0.9), (14, 0.9)]))
    found.choose(said([(1, 0.9), (2, 0.2)], [(3, 0.5), (4, 0.6)]))
    assert (found.picks.tolist(), found.chosen.tokens.tolist()) == ([2, 1], [10, 4])
    assert (found.alone, found.rest()) == (None, None)
    found.choose(said([(1, 0.1), (2, 0.9)], [(3, 0.2), (4, 0.1)]))
    assert found.chosen.tokens.tolist() == [11, 4]
    found.choose(said([(1, 0.1), (2, 0.9)], [(3, 0.2), (4, 0.1)]))
    assert (found.picks.tolist(), found.chosen.tokens.tolist()) == ([1, 1], [3, 4])


def test_where_all_is_looked_up_nobody_need_run():
    found = router(can_be_alone=True, lookup=True)
    found.begin(offer([(10, 0.9), (11, 0.8), (15, 0.7)], [(12, 0.9), (13, 0.6), (-1, 0.0)]))
    found.choose(said([(1, 0.5), (2, 0.2)], [(3, 0.5), (4, 0.6)]))
    assert found.picks.tolist() == [2, 2]
    rest = found.rest()
    assert rest.tokens.tolist() == [[11], [13]]
    torch.testing.assert_close(rest.confidences.exp(), torch.tensor([[0.8], [0.6]]))


def test_lookups_are_trusted_like_others():
    found = router(lookup=True)
    slots, rows = torch.tensor([0, 1]), torch.tensor([0, 1])
    for _ in range(4):  # what is looked up is wrong in the first request, right in the second
        found.begin(offer([(9, 0.8)], [(9, 0.8)]))
        found.choose(said([(1, 0.7), (1, 0.7)], [(2, 0.1), (2, 0.1)]))
        found.hear(rows, slots, torch.tensor([1, 9]))
    found.begin(offer([(9, 0.8)], [(9, 0.8)]))
    found.choose(said([(1, 0.7), (1, 0.7)], [(2, 0.1), (2, 0.1)]))
    assert found.picks.tolist() == [0, 2]
