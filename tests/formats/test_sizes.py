"""The formats at the sizes of Llama 3 8B: names and shapes, without memory for any weight."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from taps_hf import Eagle3Drafter, EagleDrafter
from taps_hf.formats.checkpoint import Checkpoint, Header
from taps_hf.formats.eagle import read as read_eagle
from taps_hf.formats.eagle3 import read as read_eagle3
from taps_hf.formats.load import recognise
from taps_hf.formats.reading import Target
from taps_hf.formats.writing import ENGINES

from .foreign import EAGLE_CONFIG

VOCAB, DRAFT, WIDTH, MIDDLE, HEADS, SHARED, LAYERS = 128256, 32000, 4096, 14336, 32, 8, 32
CONFIG = {
    **EAGLE_CONFIG,
    "hidden_size": WIDTH,
    "intermediate_size": MIDDLE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": SHARED,
    "vocab_size": VOCAB,
}


def layer(prefix: str, read: int) -> dict[str, tuple[int, ...]]:
    keys = SHARED * WIDTH // HEADS
    return {
        f"{prefix}self_attn.q_proj.weight": (WIDTH, read),
        f"{prefix}self_attn.k_proj.weight": (keys, read),
        f"{prefix}self_attn.v_proj.weight": (keys, read),
        f"{prefix}self_attn.o_proj.weight": (WIDTH, WIDTH),
        f"{prefix}mlp.gate_proj.weight": (MIDDLE, WIDTH),
        f"{prefix}mlp.up_proj.weight": (MIDDLE, WIDTH),
        f"{prefix}mlp.down_proj.weight": (WIDTH, MIDDLE),
        f"{prefix}post_attention_layernorm.weight": (WIDTH,),
    }


EAGLE = {"fc.weight": (WIDTH, 2 * WIDTH), **layer("layers.0.", WIDTH)}
EAGLE3 = {
    "fc.weight": (WIDTH, 3 * WIDTH),
    **layer("midlayer.", 2 * WIDTH),
    "midlayer.input_layernorm.weight": (WIDTH,),
    "midlayer.hidden_norm.weight": (WIDTH,),
    "norm.weight": (WIDTH,),
    "lm_head.weight": (DRAFT, WIDTH),
}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    fields = {k: v for k, v in CONFIG.items() if k not in ("architectures", "model_type")}
    fields |= {"num_hidden_layers": LAYERS, "max_position_embeddings": 8192}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields))


def checkpoint(shapes, config) -> Checkpoint:
    file = Path("model.safetensors")
    tensors = {
        name: torch.empty(shape, dtype=torch.float16, device="meta")
        for name, shape in shapes.items()
    }
    if "lm_head.weight" in tensors:
        ids = torch.arange(DRAFT) * 4
        tensors["d2t"] = ids - torch.arange(DRAFT)
        tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, ids, True)
    headers = {n: Header(tuple(x.shape), x.dtype, file, n) for n, x in tensors.items()}
    return Checkpoint("somebody/head", Path("config.json"), config, headers, tensors)


def made(found, kind):
    with torch.device("meta"):
        drafter = kind(found.config)
    drafter.load_state_dict(found.state, assign=True)
    return drafter


def shapes_of(written) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in written.tensors.items()}


@pytest.mark.parametrize("bias", [False, True])
def test_eagle2(target, bias):
    shapes = {**EAGLE, **({"fc.bias": (WIDTH,)} if bias else {})}
    # The published file: with the embedding, without the bias, in float16.
    numbers = sum(torch.Size(s).numel() for s in EAGLE.values()) + VOCAB * WIDTH
    assert round(numbers / 1e6, 1) == 777.0
    source = checkpoint(shapes, CONFIG)
    assert recognise(source) == "eagle"
    drafter = made(read_eagle(source, Target.of(target)), EagleDrafter)
    embedding = {"embed_tokens.weight": (VOCAB, WIDTH)}
    to = {to: writers[EagleDrafter] for to, writers in ENGINES.items() if EagleDrafter in writers}
    assert shapes_of(to["eagle"](drafter, target)) == {**shapes, **embedding}
    assert shapes_of(to["sglang"](drafter, target)) == {**EAGLE, "fc.bias": (WIDTH,)}
    if not bias:
        assert shapes_of(to["vllm"](drafter, target)) == EAGLE


@pytest.mark.parametrize("prefix", ["midlayer.", "layers.0."])
def test_eagle3(target, prefix):
    numbers = sum(torch.Size(s).numel() for s in EAGLE3.values())
    assert round(numbers / 1e6, 1) == 424.7
    shapes = {name.replace("midlayer.", prefix): shape for name, shape in EAGLE3.items()}
    source = checkpoint(shapes, {**CONFIG, "draft_vocab_size": DRAFT})
    assert recognise(source) == "eagle3"
    found = read_eagle3(source, Target.of(target))
    assert found.config.layer_ids == [2, 16, 29]
    drafter = made(found, Eagle3Drafter)
    maps = {"d2t": (DRAFT,), "t2d": (VOCAB,)}
    for to, writers in ENGINES.items():
        written = writers[Eagle3Drafter](drafter, target)
        named = "layers.0." if to == "speculators" else "midlayer."
        wanted = {name.replace("midlayer.", named): shape for name, shape in EAGLE3.items()}
        copied = {"embed_tokens.weight": (VOCAB, WIDTH)} if to == "speculators" else {}
        assert shapes_of(written) == {**wanted, **maps, **copied}
        assert written.config["draft_vocab_size"] == DRAFT
        ids = written.tensors["d2t"] + torch.arange(DRAFT)
        assert torch.equal(ids, torch.arange(DRAFT) * 4)


@pytest.mark.parametrize(("shapes", "read"), [(EAGLE, read_eagle), (EAGLE3, read_eagle3)])
def test_another_targets_head_is_refused_by_its_headers(target, shapes, read):
    of_70b = SimpleNamespace(**{**vars(Target.of(target)), "hidden_size": 8192})
    with pytest.raises(ValueError, match="`hidden_size` 4096, but the target's is 8192"):
        read(checkpoint(shapes, CONFIG), of_70b)
