from __future__ import annotations

import json
import threading

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from taps_hf import AnswerMemory, DraftRequest, DynamicTree

from ..tiny import VOCAB, prompt, refused, tiny_drafters, tiny_target

SHAPE = DynamicTree(8, 8, 20)


def proposed(memory: AnswerMemory, text: list[int]) -> list[int]:
    tree = memory.draft(text, DraftRequest(torch.tensor(text[-1:]), SHAPE, 9))
    return [] if tree is None else tree.tokens.tolist()[1:]


def answer(memory: AnswerMemory, **settings):
    """By a target that says of its own, whatever it is asked, what it said before."""

    def recite(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = input_ids.shape[1]
        return scores.index_fill(1, torch.tensor([place * place % 13]), 1e4)

    settings = {"return_dict_in_generate": True, "max_new_tokens": 40, **settings}
    return tiny_target().generate(
        prompt(9),
        do_sample=False,
        logits_processor=LogitsProcessorList([recite]),
        assistant_models=memory,
        strategy="single",
        **settings,
    )


def test_what_an_answer_said_is_proposed_in_the_next():
    memory = AnswerMemory()
    first, second = answer(memory), answer(memory)
    assert torch.equal(first.sequences, second.sequences)
    assert first.draft_trace.tau == 1
    assert second.draft_trace.tau > 4
    assert len(memory) == 80


def test_only_answers_are_remembered_and_none_that_an_exception_ended():
    memory = AnswerMemory()

    def stop(cycle) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        answer(memory, on_cycle=stop)
    assert len(memory) == 0
    answer(memory, max_new_tokens=7)
    assert len(memory) == 7


def test_ends_of_answers_are_not_proposed_nor_what_followed_them():
    memory = AnswerMemory()
    memory.remember([1, 2, 3, 4, 5], VOCAB)
    memory.remember([6, 7, 8], VOCAB)
    assert proposed(memory, [1, 2, 3]) == [4, 5]
    assert proposed(memory, [3, 4, 5]) == []
    assert proposed(memory, [9, 2, 3]) == []  # too short a match


def test_it_forgets_the_oldest_and_never_remembers_more_than_it_may():
    memory = AnswerMemory(capacity=40)
    for start in range(0, 200, 10):
        memory.remember(range(start, start + 10), 2000)
        assert len(memory) <= 40
    assert proposed(memory, [192, 193, 194]) == [195, 196, 197, 198, 199]
    assert proposed(memory, [2, 3, 4]) == []
    memory.remember(range(1000, 1100), 2000)
    assert proposed(memory, [1096, 1097, 1098]) == [1099]
    assert len(memory) <= 40
    memory.forget_all()
    assert len(memory) == 0
    assert proposed(memory, [1096, 1097, 1098]) == []


def test_a_file_is_gone_on_from(tmp_path):
    file = tmp_path / "answers.json"
    first = AnswerMemory(file)
    text = answer(first).sequences[0, 9:].tolist()
    assert json.loads(file.read_text()) == {"vocab_size": VOCAB, "answers": [text]}
    again = AnswerMemory(file)
    assert len(again) == 40
    assert answer(again).draft_trace.tau > 4
    assert [path.name for path in tmp_path.iterdir()] == ["answers.json"]
    again.forget_all()
    assert not file.exists()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"vocab_size": 16}', '{"vocab_size": 16, "answers": [3]}']
    + ['{"vocab_size": 16, "answers": [[16]]}', '{"vocab_size": 16, "answers": [["a"]]}']
    + ['{"vocab_size": 16, "answers": [[true]]}', '{"vocab_size": null, "answers": []}'],
)
def test_other_files_are_refused(tmp_path, content):
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json .*expected the answers of a taps_hf"):
        AnswerMemory(file)
    assert file.read_text() == content


def test_what_cannot_be_used_is_refused(tmp_path):
    for wrong in (1, 0, -5, 2.5, True, "many"):
        with pytest.raises(ValueError, match="capacity"):
            AnswerMemory(capacity=wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        AnswerMemory(tmp_path / "file" / "answers.json")
    file = tmp_path / "answers.json"
    file.write_text(json.dumps({"vocab_size": 99, "answers": [[98]]}))
    refused(
        "answers of a target with 99 tokens, and this one has 16",
        assistant_models=AnswerMemory(file),
    )


def test_threads_share_it():
    memory, errors = AnswerMemory(capacity=600), []

    def ask(seed: int) -> None:
        try:
            torch.manual_seed(seed)
            for _ in range(3):
                answer(memory)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert 0 < len(memory) <= 600
    assert answer(memory).draft_trace.tau > 4


@pytest.mark.parametrize("strategy", ["auto", "merged"])
def test_the_text_is_plain_generates_whatever_is_remembered(strategy):
    memory = AnswerMemory()
    target = tiny_target()
    for seed in range(3):
        found = []
        for drafters in (
            {},
            {"assistant_models": [memory, *tiny_drafters(1)], "strategy": strategy},
        ):
            torch.manual_seed(seed % 2)
            found.append(target.generate(prompt(9), max_new_tokens=30, do_sample=True, **drafters))
        assert torch.equal(*found)
    assert len(memory) == 90


def test_an_answer_is_worth_more_than_its_memory(tmp_path):
    """A file that can no longer be written costs neither the answer nor its end."""
    file = tmp_path / "answers.json"
    memory = AnswerMemory(file)
    file.mkdir()  # in the place of the file

    class Listener(BaseStreamer):
        ended = 0

        def put(self, value: torch.Tensor) -> None:
            pass

        def end(self) -> None:
            self.ended += 1

    listener = Listener()
    with pytest.warns(UserWarning, match="may not be remembered"):
        said = answer(memory, streamer=listener).sequences
    assert said.shape == (1, 49)
    assert listener.ended == 1
    assert answer_of_nobody().equal(said)


@pytest.mark.parametrize("what", ["a file", "a link"])
def test_what_a_user_puts_in_its_place_stays(tmp_path, what):
    file = tmp_path / "answers.json"
    memory = AnswerMemory(file)
    theirs = file if what == "a file" else tmp_path / "theirs.json"
    theirs.write_text('{"mine": 1}')
    if what == "a link":
        file.symlink_to(theirs)
    with pytest.raises(ValueError, match="holds something else by now"):
        memory.remember([1, 2, 3], VOCAB)
    with pytest.raises(ValueError, match="holds something else by now"):
        memory.forget_all()
    assert len(memory) == 0
    assert theirs.read_text() == '{"mine": 1}'
    assert file.is_symlink() == (what == "a link")


def test_a_link_to_a_memory_leads_there(tmp_path):
    AnswerMemory(tmp_path / "answers.json").remember([1, 2, 3], VOCAB)
    (tmp_path / "link").symlink_to(tmp_path / "answers.json")
    memory = AnswerMemory(tmp_path / "link")
    memory.remember([4, 5, 6], VOCAB)
    assert len(AnswerMemory(tmp_path / "answers.json")) == 6
    assert (tmp_path / "link").is_symlink()


def answer_of_nobody() -> torch.Tensor:
    return answer(AnswerMemory()).sequences


def test_answers_of_another_target_are_not_taken_until_all_are_forgotten(tmp_path):
    memory = AnswerMemory(tmp_path / "answers.json")
    memory.remember([1, 2, 3], 99)
    assert len(AnswerMemory(memory.path)) == 3
    with pytest.raises(ValueError, match="one with 99"):
        memory.remember([1, 2, 3], VOCAB)
    memory.forget_all()
    answer(memory)
    assert len(memory) == 40


def test_what_drafting_costs_is_measured_once_for_all_memories():
    assert AnswerMemory().run_key() == AnswerMemory(capacity=50).run_key()
    drafters = [AnswerMemory(), AnswerMemory()]
    assert not AnswerMemory.runs_as_one(drafters)
