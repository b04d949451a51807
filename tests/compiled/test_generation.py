"""`generate(..., compile=True)`: the text is plain generate's, and all else works as well."""

from __future__ import annotations

import shutil
import threading

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

import taps_hf
from taps_hf.cache import CACHE
from taps_hf.compiled.settings import compilation_for
from taps_hf.measuring import learnt_costs
from tests.saved import letter_tokenizer
from tests.test_parity import PenaliseRecent
from tests.tiny import prompt, tiny_drafters, tiny_eagle3, tiny_target

EAGER = CompileConfig(backend="eager", mode=None, fullgraph=True)
TREE = taps_hf.DynamicTree(depth=3, top_k=4, num_nodes=12)
STRATEGIES = ["single", "confidence", "entropy", "merged", taps_hf.Merged(num_nodes=12), "auto"]


def both(inputs, seed=None, family="llama", drafters=None, tokens=24, ours=None, **kwargs):
    """What plain `generate` returns, and what compiled cycles do: whole outputs."""
    target = tiny_target(family)
    settings = {
        "assistant_models": drafters or list(tiny_drafters(2, family)),
        "strategy": "merged",
        "tree": TREE,
        "compile": EAGER,
        **(ours or {}),
    }
    if seed is not None:
        kwargs = {"top_k": 0, **kwargs}
    outputs = []
    for more in ({}, settings):
        if seed is not None:
            torch.manual_seed(seed)
        outputs.append(
            target.generate(
                inputs,
                max_new_tokens=tokens,
                do_sample=seed is not None,
                return_dict_in_generate=True,
                **kwargs,
                **more,
            )
        )
    return outputs


def assert_same_text(outputs) -> None:
    plain, ours = outputs
    assert torch.equal(plain.sequences, ours.sequences)
    # Rows that a pass has in addition are nobody's nodes.
    most = TREE.num_nodes * len(ours.draft_trace.drafters)
    assert all(cycle.num_nodes <= most for cycle in ours.draft_trace.cycles)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_strategies(strategy):
    for seed in (None, 0):
        assert_same_text(both(prompt(), seed, ours={"strategy": strategy}))


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_windows(family: str):
    for seed in (None, 0):
        assert_same_text(both(prompt(), seed, family))


def test_something_is_accepted():
    *_, ours = both(prompt(), 0, tokens=40)
    assert ours.draft_trace.accepted_length > 0.1


def test_kinds_in_one_tree():
    """EAGLE-3 reads inner layers, a lookup none."""
    drafters = [tiny_drafters(1)[0], tiny_eagle3(1)[0], taps_hf.PromptLookup()]
    for seed in (None, 3):
        assert_same_text(both(prompt(), seed, drafters=drafters))


def test_lookups_alone():
    repeating = prompt(5).repeat(1, 3)
    assert_same_text(both(repeating, drafters=[taps_hf.PromptLookup()]))


@pytest.mark.parametrize(
    "processing",
    [
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"eos_token_id": [2, 5]},
        {"output_scores": True, "output_logits": True},
        {"logits_processor": [PenaliseRecent()]},
    ],
    ids=lambda processing: ", ".join(processing),
)
def test_processors_and_stopping(processing: dict):
    for seed in (None, 1):
        outputs = both(prompt(), seed, **processing)
        assert_same_text(outputs)
        for name in ("scores", "logits"):
            if (expected := getattr(outputs[0], name)) is not None:
                found = torch.cat(getattr(outputs[1], name))
                torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_stop_strings():
    tokenizer = letter_tokenizer()
    plain = tiny_target().generate(prompt(), max_new_tokens=24, do_sample=False)
    stop = tokenizer.decode(plain[0, 15:17])
    assert_same_text(both(prompt(), stop_strings=[stop], tokenizer=tokenizer))


def test_padded_prompts():
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[:, :3] = 0
    for seed in (None, 0):
        assert_same_text(both(prompt(), seed, attention_mask=mask))


def test_streamers_and_cycles_are_heard():
    class Listener:
        def __init__(self):
            self.heard = []

        def put(self, value):
            self.heard += value.flatten().tolist()

        def end(self):
            self.heard.append(None)

    listener, cycles = Listener(), []
    out = tiny_target().generate(
        prompt(),
        max_new_tokens=12,
        do_sample=False,
        assistant_models=list(tiny_drafters(2)),
        strategy="merged",
        tree=TREE,
        compile=EAGER,
        streamer=listener,
        on_cycle=cycles.append,
        output_draft_trees=True,
    )
    assert listener.heard == [*out[0].tolist(), None]
    assert [token for cycle in cycles for token in cycle.tokens] == out[0, 9:].tolist()
    assert all(cycle.tree is not None for cycle in cycles)


def test_a_conversation_goes_on():
    """From a cache that compiled cycles filled, compiled and not, drafters with what they know."""
    target = tiny_target()
    settings = {"assistant_models": list(tiny_drafters(2)), "strategy": "merged", "tree": TREE}
    given = {"max_new_tokens": 12, "do_sample": False}
    for second in (EAGER, False):
        first = target.generate(
            prompt(), return_dict_in_generate=True, compile=EAGER, **given, **settings
        )
        text = torch.cat([first.sequences, prompt(4, seed=5)], dim=1)
        expected = target.generate(text, **given)
        more = {CACHE: first[CACHE]}
        found = target.generate(text, compile=second, **given, **settings, **more)
        assert torch.equal(found, expected)


def test_rejection():
    """Its proposals are sampled by drafters; the pass that scores them is the same."""
    texts = []
    for compiled in (EAGER, False):
        torch.manual_seed(4)
        texts.append(
            tiny_target().generate(
                prompt(),
                max_new_tokens=24,
                do_sample=True,
                top_k=0,
                assistant_models=[tiny_drafters(1)[0]],
                tree=taps_hf.FixedTree.from_branching([4, 3]),
                verification="rejection",
                compile=compiled,
            )
        )
    assert torch.equal(*texts)


def test_to_the_end_of_the_targets_positions():
    assert_same_text(both(prompt(230), tokens=26))


def test_the_second_answer_compiles_nothing():
    both(prompt(), 0)
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        both(prompt(30), 1, tokens=60)
    assert counters["stats"]["unique_graphs"] == before


def test_two_threads():
    expected = [both(prompt(seed=seed), seed=None)[0].sequences for seed in range(2)]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    barrier = threading.Barrier(2)

    def answer(number: int) -> None:
        barrier.wait()
        for _ in range(3):
            found[number].append(
                tiny_target().generate(
                    prompt(seed=number),
                    max_new_tokens=24,
                    do_sample=False,
                    assistant_models=list(tiny_drafters(2)),
                    strategy="merged",
                    tree=TREE,
                    compile=EAGER,
                )
            )

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, texts in found.items():
        assert len(texts) == 3
        assert all(torch.equal(text, expected[number]) for text in texts)


def test_costs_are_those_of_compiled_passes():
    target, drafters = tiny_target(), list(tiny_drafters(2))
    compilation = compilation_for(EAGER, target, 60, 12, 2)
    learnt = learnt_costs(target, drafters, TREE, compilation=compilation)
    costs = learnt.measured
    assert costs.widths == (1, 8, 16, 32)
    assert [width for width, _ in costs.target] == [1, 8, 16, 32]
    assert costs.target_seconds(9) == costs.target_seconds(16)
    assert learnt_costs(target, drafters, TREE, compilation=compilation) is learnt
    assert learnt_costs(target, drafters, TREE) is not learnt
    learnt.observe(9, 2 * costs.target_seconds(16), (), 1, 0.0)
    assert learnt.costs.widths == costs.widths
    assert learnt.costs.target_seconds(9) == learnt.costs.target_seconds(16)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_backends(backend: str):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("Inductor needs a C++ compiler on a CPU")
    mode = "reduce-overhead" if backend == "inductor" else None
    config = CompileConfig(backend=backend, mode=mode, fullgraph=True)
    for seed in (None, 0):
        assert_same_text(
            both(prompt(), seed, drafters=[tiny_drafters(1)[0]], ours={"compile": config})
        )


def test_true_takes_the_configuration_of_generate():
    ours = {"compile": True, "compile_config": EAGER}
    assert_same_text(both(prompt(), ours=ours))
