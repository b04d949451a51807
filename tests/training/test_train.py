from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, TrainerCallback

from taps_hf import Eagle3Drafter, EagleDrafter
from taps_hf.cli import main
from taps_hf.training.encoding import Example
from taps_hf.training.folders import last_checkpoint
from taps_hf.training.options import TrainOptions, train_options
from taps_hf.training.rows import is_held_out
from taps_hf.training.train import train

from ..saved import tree_of
from ..tiny import needs_muon, tiny_target
from .chat import CHATML, chat_tokenizer

_TINY = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A target with a tokenizer, and answers in two files."""
    folder = tmp_path_factory.mktemp("train")
    tiny_target().save_pretrained(folder / "target")
    chat_tokenizer(CHATML).save_pretrained(folder / "target")
    rng = random.Random(0)
    for name in ("math", "chat"):
        rows = []
        for _ in range(60):
            words = [f"t{rng.randrange(5, 15)}" for _ in range(rng.randrange(3, 9))]
            rows.append({"instruction": " ".join(words), "output": " ".join(words[::-1])})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture
def options(folder, tmp_path) -> TrainOptions:
    return TrainOptions(
        target=str(folder / "target"),
        data=[str(folder / "math.jsonl")],
        out=str(tmp_path / "drafter"),
        held_out=0.2,
        eval_depth=3,
        epochs=2,
        batch_size=4,
        learning_rate=1e-2,
        evaluations=4,
        dtype="float32",
        mixed_precision=False,
        device="cpu",
    )


@pytest.mark.parametrize("place", ["project", "link", "checkpoints", "checkpoints of others"])
def test_nothing_that_others_wrote_is_touched(options, tmp_path, monkeypatch, place):
    project, out = tmp_path / "project", tmp_path / "drafter"
    (project / ".git").mkdir(parents=True)
    (project / "data.jsonl").write_text("rows")
    monkeypatch.setattr("taps_hf.training.train.load_target", None)  # nothing is loaded
    if place == "project":
        out = project
    elif place == "link":
        out.symlink_to(project)
    elif place == "checkpoints":
        (tmp_path / "drafter.checkpoints").write_text("mine")
    else:
        (tmp_path / "drafter.checkpoints" / "checkpoint-5").mkdir(parents=True)
    before = tree_of(tmp_path)
    with pytest.raises(ValueError, match="expected"):
        train(replace(options, out=str(out)))
    assert tree_of(tmp_path) == before


def test_folders_that_would_be_lost_are_refused(options, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("taps_hf.training.train.load_target", None)  # nothing is loaded

    def refused(message: str, **changes) -> None:
        before = tree_of(tmp_path)
        with pytest.raises(ValueError, match=message):
            train(replace(options, **changes))
        assert tree_of(tmp_path) == before

    out, work = Path(options.out), Path(options.out + ".checkpoints")
    shutil.copytree(folder / "target", tmp_path / "target")
    target = str(tmp_path / "target")
    refused("`target` is .* `out` would replace", out=target, target=target)
    refused("`features` is .* `out` would replace", features=[str(out / "features")])
    refused("`features` is .*; expected one elsewhere", features=[str(work / "features")])
    refused("holds other things", features=[target])
    refused("deletes old checkpoints", out=str(tmp_path / "a.checkpoints" / "checkpoint-7"))
    work.mkdir()
    (work / "options.json").write_text("{}")
    shutil.copy(options.data[0], work / "rows.jsonl")
    refused("`data` is .*, where old checkpoints are deleted", data=[str(work / "rows.jsonl")])
    (work / "checkpoint-7-kept").mkdir()
    refused("holds checkpoint-7-kept; expected nothing there")


def test_a_result_takes_the_place_of_the_same_runs_alone(options, tmp_path):
    others = [tmp_path / name for name in ("drafter.tmp", "drafter.old")]
    for other in others:
        other.mkdir()
        (other / "notes").write_text("mine")
    options = replace(options, max_steps=2)
    train(options)
    card = Path(options.out) / "README.md"
    assert train(options)  # all is done: what it wrote is written again
    assert [tree_of(other) for other in others] == [{"notes": b"mine"}] * 2
    before = tree_of(Path(options.out))
    with pytest.raises(ValueError, match="`out` would replace"):
        train(replace(options, init_from=options.out))
    assert tree_of(Path(options.out)) == before
    card.write_text("a better card")
    with pytest.raises(ValueError, match=r"README\.md, which was changed"):
        train(options)
    assert card.read_text() == "a better card"


def weights(folder) -> dict[str, torch.Tensor]:
    return EagleDrafter.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("objective", ["eagle", "hass"])
def test_training_writes_a_drafter_that_got_better(options, folder, objective, capsys):
    options = replace(
        options,
        objective=objective,
        draft_vocab=12,
        eval_data=[str(folder / "chat.jsonl")],
        token_weight=1.0,
        epochs=8,
    )
    measured = train(options)
    drafter = EagleDrafter.from_pretrained(options.out)
    assert drafter.config.backbone == {"eagle": "eagle2", "hass": "hass"}[objective]
    assert drafter.config.training_data == ["math.jsonl"]
    assert len(drafter.draft_token_ids) == 12
    assert drafter.dtype == torch.bfloat16
    assert sorted(file.name for file in Path(options.out).iterdir()) == [
        ".taps-hf.json",
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    target = transformers.AutoModelForCausalLM.from_pretrained(folder / "target")
    ids = torch.tensor([[3, 5, 6, 4]])
    plain = target.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert target.generate(
        ids, max_new_tokens=12, do_sample=False, pad_token_id=0, assistant_models=[drafter.float()]
    ).equal(plain)
    work = Path(options.out + ".checkpoints")
    (last,) = [x for x in work.glob("checkpoint-*") if x.name.endswith(str(_steps(work)))]
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_math.jsonl_loss"] for entry in history if "eval_math.jsonl_loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert {k.rpartition(".jsonl_")[0] for k in measured} == {"math", "chat"}
    record = json.loads((work / "training.json").read_text())
    assert record["measured"] == measured
    assert ModelCard.load(f"{options.out}/README.md").data.tags[1] == drafter.config.backbone
    said = capsys.readouterr().out
    assert "60 rows used" in said
    assert "draft vocabulary of 12: " in said


def _steps(work: Path, below: int = 10**9) -> int:
    found = [int(folder.name.rpartition("-")[2]) for folder in work.glob("checkpoint-*")]
    return max(step for step in found if step < below)


class Stop(TrainerCallback):
    """Interrupts a run after a step, between two checkpoints."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_more_rows_are_another_run(options, folder, tmp_path):
    data = tmp_path / "math.jsonl"
    data.write_text((folder / "math.jsonl").read_text())
    options = replace(options, data=[str(data)], max_steps=2)
    train(options)
    with data.open("a") as file:
        file.write(json.dumps({"instruction": "t5", "output": "t6"}) + "\n")
    with pytest.raises(ValueError, match=r"begun with other options.*rows"):
        train(options)


@pytest.mark.parametrize(
    ("stored", "optimizer"),
    [(False, "adamw"), (True, "adamw"), pytest.param(False, "muon", marks=needs_muon)],
)
def test_a_stopped_run_ends_with_the_same_bits(options, tmp_path, monkeypatch, stored, optimizer):
    features = [str(tmp_path / "features")] if stored else []
    whole = replace(options, features=features, optimizer=optimizer)
    stopped = replace(whole, out=str(tmp_path / "stopped"))
    train(whole)
    from taps_hf.training import train as module

    trainer = module.DrafterTrainer
    monkeypatch.setattr(
        module, "DrafterTrainer", lambda **kwargs: trainer(callbacks=[Stop(17)], **kwargs)
    )
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    assert not Path(stopped.out).exists()
    monkeypatch.undo()
    torch.rand(7)  # another state of the generator than the one it was stopped in
    train(stopped)
    expected, found = weights(whole.out), weights(stopped.out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # A checkpoint that was being written when the run was killed is passed over.
    last = Path(stopped.out + ".checkpoints", "checkpoint-999")
    last.mkdir()
    (last / "trainer_state.json").write_text('{"half')
    assert last_checkpoint(last.parent).endswith(str(_steps(last.parent, below=999)))
    with pytest.raises(ValueError, match=r"begun with other options.*learning_rate"):
        train(replace(stopped, learning_rate=1e-3))


def test_accumulated_batches_train_like_one(options, tmp_path):
    options = replace(options, objective="hass", noise=0.0, epochs=1, evaluations=1)
    train(replace(options, batch_size=4))
    halves = replace(options, batch_size=2, gradient_accumulation=2, out=str(tmp_path / "halves"))
    train(halves)
    expected, found = weights(options.out), weights(halves.out)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3)


def test_training_goes_on_from_a_drafter(options, tmp_path):
    train(replace(options, draft_vocab=10))
    hass = replace(
        options, out=str(tmp_path / "hass"), objective="hass", init_from=options.out, max_steps=4
    )
    train(replace(hass, learning_rate=1e-9, schedule="constant"))
    found, expected = weights(hass.out), weights(options.out)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4)
    assert EagleDrafter.from_pretrained(hass.out).config.backbone == "hass"
    with pytest.raises(ValueError, match="is a drafter with"):
        train(replace(hass, fc_bias=True, out=str(tmp_path / "other")))
    train(replace(hass, draft_vocab=11, out=str(tmp_path / "wider")))
    assert len(EagleDrafter.from_pretrained(f"{tmp_path}/wider").draft_token_ids) == 11


def test_a_window_is_kept_with_the_weights_and_trains_nothing_else(options, tmp_path):
    near = replace(options, max_steps=4, context_window=5)
    far = replace(near, context_window=None, out=str(tmp_path / "far"))
    for each in (near, far):
        train(each)
    found, expected = weights(near.out), weights(far.out)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert EagleDrafter.from_pretrained(near.out).config.context_window == 5
    assert "looks back over 5 tokens" in Path(near.out, "README.md").read_text()
    assert "looks back over the whole context" in Path(far.out, "README.md").read_text()
    # Whoever goes on from it keeps it, or asks for another.
    for asked, kept in ((None, 5), (7, 7)):
        more = replace(near, init_from=near.out, context_window=asked, out=f"{tmp_path}/{asked}")
        train(more)
        assert EagleDrafter.from_pretrained(more.out).config.context_window == kept


@pytest.fixture
def eagle3(options) -> TrainOptions:
    return replace(options, objective="eagle3", layer_ids=[1, 2], draft_vocab=12, steps=3)


@pytest.mark.parametrize("start", ["random", "target_head"])
def test_an_eagle3_drafter_gets_better_and_drafts(eagle3, folder, start, capsys):
    measured = train(replace(eagle3, start=start, epochs=8))
    drafter = AutoModel.from_pretrained(eagle3.out)
    assert isinstance(drafter, Eagle3Drafter)
    assert drafter.config.layer_ids == [1, 2]
    assert drafter.config.training_data == ["math.jsonl"]
    assert drafter.draft_token_ids.diff().min() > 0
    assert len(drafter.draft_token_ids) == 12
    work = Path(eagle3.out + ".checkpoints")
    history = json.loads((work / f"checkpoint-{_steps(work)}/trainer_state.json").read_text())
    losses = [entry["loss"] for entry in history["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0]
    assert measured["math.jsonl_accepted_length"] > 0
    card = ModelCard.load(f"{eagle3.out}/README.md")
    assert "eagle3" in card.data.tags
    assert "# EAGLE-3 drafter for target" in card.text
    assert "hidden states 1, 2" in card.text
    assert "taps_hf.Eagle3Drafter.from_pretrained" in card.text
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    ids = torch.tensor([[3, 5, 6, 4]])
    plain = target.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert target.generate(
        ids, max_new_tokens=12, do_sample=False, pad_token_id=0, assistant_models=[drafter.float()]
    ).equal(plain)


def test_an_eagle3_run_with_a_store_ends_as_one_without(eagle3, tmp_path):
    """Stopped in between, too; and EAGLE-2 reads its own part of that store."""
    eagle3 = replace(eagle3, max_steps=8, evaluations=2)
    train(eagle3)
    stored = replace(eagle3, features=[str(tmp_path / "features")], out=str(tmp_path / "stored"))
    train(stored)
    # A store keeps bfloat16, and AdamW makes large steps of small differences.
    expected, found = evaluation_losses(eagle3.out), evaluation_losses(stored.out)
    assert len(expected) == 2
    assert expected[1] < expected[0]
    assert found == pytest.approx(expected, rel=0.02)
    before = (tmp_path / "features" / "features.bin").read_bytes()
    train(replace(stored, objective="eagle", layer_ids=[], out=str(tmp_path / "eagle")))
    assert (tmp_path / "features" / "features.bin").read_bytes() == before


def evaluation_losses(out: str) -> list[float]:
    work = Path(out + ".checkpoints")
    state = json.loads((work / f"checkpoint-{_steps(work)}/trainer_state.json").read_text())
    entries = [item for entry in state["log_history"] for item in entry.items()]
    return [value for name, value in entries if name.startswith("eval_") and name.endswith("_loss")]


def eagle3_weights(folder) -> dict[str, torch.Tensor]:
    return Eagle3Drafter.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=needs_muon)])
def test_a_stopped_eagle3_run_ends_with_the_same_bits(eagle3, tmp_path, monkeypatch, optimizer):
    eagle3 = replace(eagle3, max_steps=8, evaluations=4, optimizer=optimizer, start="target_head")
    stopped = replace(eagle3, out=str(tmp_path / "stopped"))
    train(eagle3)
    from taps_hf.training import train as module

    trainer = module.DrafterTrainer
    monkeypatch.setattr(
        module, "DrafterTrainer", lambda **kwargs: trainer(callbacks=[Stop(5)], **kwargs)
    )
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.undo()
    train(stopped)
    expected, found = eagle3_weights(eagle3.out), eagle3_weights(stopped.out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_eagle3_goes_on_from_a_drafter(eagle3, options, tmp_path):
    eagle3 = replace(eagle3, max_steps=3, evaluations=1)
    train(eagle3)
    more = replace(eagle3, init_from=eagle3.out, draft_vocab=None, learning_rate=1e-9)
    train(replace(more, out=str(tmp_path / "more")))
    found, expected = eagle3_weights(tmp_path / "more"), eagle3_weights(eagle3.out)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4)

    def refused(message: str, **changes) -> None:
        with pytest.raises(ValueError, match=message):
            train(replace(more, out=str(tmp_path / "refused"), **changes))
        shutil.rmtree(tmp_path / "refused.checkpoints")

    refused("is a drafter with .*layer_ids", layer_ids=[2, 1])
    refused("does not score", draft_vocab=16)
    refused("is a Eagle3Drafter, expected the EagleDrafter", objective="eagle", layer_ids=[])
    refused("too few for EAGLE-3", init_from=None, layer_ids=[])


def test_a_fitted_start_is_where_training_begins(options, capsys):
    """Seen after a single step of hardly any size; what the fit is worth, test_start shows."""
    still = replace(options, max_steps=1, learning_rate=1e-9, fc_bias=True)
    for start in ("random", "least_squares"):
        train(replace(still, out=f"{options.out}-{start}", start=start))
        layer = EagleDrafter.from_pretrained(f"{options.out}-{start}").trunk.layers[0]
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert (linear.weight.abs().max() < 1e-6) == (start == "least_squares")
        assert ("of the features' variance" in capsys.readouterr().out) == (
            start == "least_squares"
        )


def test_held_out_rows_are_the_same_in_every_mixture():
    rows = [Example((i, i + 1, 3), (False, True, True)) for i in range(4000)]
    share = sum(is_held_out(row, 0.1) for row in rows) / len(rows)
    assert share == pytest.approx(0.1, abs=0.02)
    few, more = ({row for row in rows if is_held_out(row, x)} for x in (0.05, 0.1))
    assert few < more
    # Another answer to a question that is held out would tell most of this one's.
    for i in range(100):
        twice = (
            Example((i, 1, *end), (False,) + (True,) * (1 + len(end))) for end in ((2,), (5, 6))
        )
        assert len({is_held_out(row, 0.3) for row in twice}) == 1


def test_two_processes_train_the_model_that_one_trains(options, folder, tmp_path):
    """Half the batch each, the same steps.

    On GPUs `accelerate launch` starts torch's launcher; on CPUs it needs MPI, so that launcher
    is used here as it is.
    """
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"target: {options.target}\ndata: [{options.data[0]}]\nheld_out: 0.2\nepochs: 1\n"
        "learning_rate: 0.01\nevaluations: 1\ndtype: float32\nmixed_precision: false\n"
        "device: cpu\nnoise: 0.0\nobjective: hass\neval_depth: 2\n"
    )
    found = []
    for processes in (1, 2):
        out = tmp_path / f"by-{processes}"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc_per_node", str(processes)]
        command = ["-m", "taps_hf.cli", "train", "--recipe", str(recipe), "--out", str(out)]
        command += ["--batch-size", str(4 // processes)]
        done = subprocess.run(launch + command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("wrote ") == 1
        found.append((weights(out), json.loads(_record(out))["measured"]))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=1e-2, atol=4e-3)
    assert found[0][1]["math.jsonl_chains"] == found[1][1]["math.jsonl_chains"]


def _record(out: Path) -> str:
    return Path(f"{out}.checkpoints", "training.json").read_text()


def test_recipes_are_overridden_by_what_is_given(tmp_path, options):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: [a.jsonl]\nout: x\nobjective: hass\nnoise: 0.3\nepochs: 3\n")
    found = train_options({"epochs": 4.0, "out": "y"}, recipe)
    assert (found.data, found.out, found.epochs) == (["a.jsonl"], "y", 4.0)
    assert (found.objective_options().steps, found.objective_options().noise) == (3, 0.3)
    for text in ("data: [a]\nfrobnicate: 1\n", "- a\n"):
        recipe.write_text(text)
        with pytest.raises(ValueError, match="expected fields among"):
            train_options({}, recipe)


RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_our_recipes_can_be_read(recipe):
    found = train_options({"data": ["a.jsonl"], "out": "x"}, recipe)
    assert found.objective in ("eagle", "hass", "eagle3")


def test_targets_whose_logits_are_not_the_heads_are_refused(options, tmp_path):
    config = AutoConfig.for_model("gemma2", **{**_TINY, "final_logit_softcapping": 30.0})
    target = AutoModelForCausalLM.from_config(config)
    target.save_pretrained(tmp_path / "target")
    chat_tokenizer(CHATML).save_pretrained(tmp_path / "target")
    with pytest.raises(ValueError, match=r"changes its logits by .*final_logit_softcapping"):
        train(replace(options, target=str(tmp_path / "target")))


def test_a_chat_template_can_be_given(options, folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder / "target", bare)
    for file in bare.glob("chat_template*"):
        file.unlink()
    options = replace(options, target=str(bare), max_steps=2)
    with pytest.raises(ValueError, match="has no chat template"):
        train(options)
    with pytest.raises(ValueError, match="`chat_template` cannot be read"):
        train(replace(options, chat_template="none", out=str(tmp_path / "a")))
    template = tmp_path / "template.jinja"
    template.write_text(CHATML)
    train(replace(options, chat_template=str(template), out=str(tmp_path / "b")))


def test_a_template_that_changed_is_another_run(options, tmp_path):
    """It may print the date: other rows would be held out, and these are trained on already."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ 't5 ' }}" + CHATML)
    options = replace(options, chat_template=str(template), max_steps=2)
    train(options)
    template.write_text("{{ 't6 ' }}" + CHATML)
    with pytest.raises(ValueError, match=r"begun with other options.*rows"):
        train(options)


def test_runs_that_do_not_fit_are_refused_and_what_is_changed_then_is_not(options, monkeypatch):
    options = replace(options, max_steps=2)
    with monkeypatch.context() as patched:
        patched.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**5))
        with pytest.raises(ValueError, match=r"takes about 0\.\d GB .* smaller `batch_size`"):
            train(options)
    with pytest.raises(ValueError, match="none is held out"):
        train(replace(options, held_out=1e-6))
    train(replace(options, batch_size=1))
    # The same folder, however it is written; and options of a run that has been begun stay.
    train(replace(options, batch_size=1, out=options.out + "/"))
    with pytest.raises(ValueError, match=r"begun with other options.*batch_size"):
        train(options)


def test_bad_input_is_refused_before_work(options, folder, tmp_path, capsys):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            train(replace(options, **changes))

    refused("`data` is empty", data=[])
    refused("`out` is empty", out="")
    refused("a file", out=str(folder / "math.jsonl"))
    refused("expected one of", objective="medusa")
    refused("`held_out` is 1.5", held_out=1.5)
    refused("`batch_size` is 0", batch_size=0)
    refused("`dtype` is", dtype="int8")
    refused("`device` is 'gpu'", device="gpu")
    refused("`learning_rate` is '3e-5'", learning_rate="3e-5")
    refused("`data` is 'a.jsonl'", data="a.jsonl")
    refused("`epochs` is 0, expected above 0", epochs=0)
    refused("`out` is", out=3)
    refused("`context_window` is 0, expected a positive", context_window=0)
    refused(r"not above `max_length` \(2048\)", context_window=2049)
    refused("is given twice", eval_data=options.data)
    refused("`draft_vocab` is 17", draft_vocab=17, out=str(tmp_path / "a"))
    refused("none is held out", held_out=1e-9, out=str(tmp_path / "b"))
    assert main(["train", "--data", "none.jsonl", "--out", str(tmp_path / "c")]) == 2
    assert "does not exist" in capsys.readouterr().err
