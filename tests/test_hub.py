"""Loading by Hub name, from a local cache as `huggingface_hub` lays it out; no network."""

from __future__ import annotations

import torch
from transformers import AutoModel

import taps_hf
from tests.tiny import prompt, tiny_drafters, tiny_target


def test_from_the_local_cache(tmp_path):
    drafter = tiny_drafters(1)[0]
    revision = "0" * 40
    repository = tmp_path / "models--someone--a-drafter"
    drafter.save_pretrained(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    for cls in (taps_hf.EagleDrafter, AutoModel):
        loaded = cls.from_pretrained("someone/a-drafter", cache_dir=tmp_path, local_files_only=True)
        assert isinstance(loaded, taps_hf.EagleDrafter)
        for name, tensor in drafter.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name])
    out = tiny_target().generate(
        prompt(), max_new_tokens=4, assistant_models=[loaded], return_dict_in_generate=True
    )
    assert out.draft_trace.drafters == ("a-drafter",)
