"""How vLLM's newer runner proposes with composed drafters; it could only be read.

vLLM 0.32.0 has two runners: this one, `v1/worker/gpu`, which it takes where Triton works (on GPUs),
and the older one, for which see `proposer`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

from .tally import Tally


class ComposedSpeculator(EagleSpeculator):
    """Of the newer runner."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.use_local_argmax_reduction = self.draft_logits is None
        # One row more, which those of padding (request -1) write to.
        self._picks = self.draft_tokens.new_zeros(self.max_num_reqs + 1, self.num_speculative_steps)

    def load_draft_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """As the base class, and then what needs the target's head."""
        model = super().load_draft_model(*args, **kwargs)
        if (routing := model.composition.drafting.routing) != "token":
            raise ValueError(
                f"The drafters are routed per {routing}, which vLLM's newer runner does not "
                "support here; set VLLM_USE_V2_MODEL_RUNNER=0, or export them with "
                "`--routing token`."
            )
        model.begin(self.max_num_reqs)
        self._tally = Tally(model.composition.names, self.vllm_config, self.device)
        return model

    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the base class, with what each drafter makes of the target's features.

        Of several layers' the base class asks for that by itself.
        """
        if self.method == "eagle":
            last_hidden_states = self.model.combine_hidden_states(last_hidden_states)
        return super().propose(
            input_batch, attn_metadata, slot_mappings, last_hidden_states, *args, **kwargs
        )

    def sample_draft(
        self,
        hidden_states: torch.Tensor,
        sample_src_positions: torch.Tensor,
        idx_mapping: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        draft_step: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the base class, noting whose each token is: without a word to the host, for graphs."""
        sampled = super().sample_draft(
            hidden_states,
            sample_src_positions,
            idx_mapping,
            temperature,
            seeds,
            draft_step,
            *args,
            **kwargs,
        )
        self._picks[idx_mapping, draft_step.expand_as(idx_mapping)] = self.model.router.picks
        return sampled

    def observe_verification(
        self, idx_mapping: torch.Tensor, num_sampled: torch.Tensor, num_rejected: torch.Tensor
    ) -> None:
        """As the base class; the last drafts have just been verified, and are counted."""
        super().observe_verification(idx_mapping, num_sampled, num_rejected)
        accepted = (num_sampled - 1).clamp(min=0)
        self._tally.add(self._picks[idx_mapping], accepted + num_rejected, accepted)
