"""How vLLM proposes with composed drafters: subclasses of the proposers of its two runners.

vLLM 0.32.0 has two: `v1/worker/gpu_model_runner`, which proposes with an `EagleProposer`, and the
newer `v1/worker/gpu`, with an `EagleSpeculator`. It takes the newer one where Triton works (on
GPUs) and the older one elsewhere (on CPUs), unless VLLM_USE_V2_MODEL_RUNNER says otherwise. The
older one is tested here; the newer one could only be read.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

from ..formats.composition import LOOKUP
from .counters import Counters
from .lookups import Lookups
from .routing import Best, Slots
from .sampling import mend

_PERIOD = 1.0  # seconds between copies of counts from a device that is not the CPU


class _Tally:
    """Counts on the device, now and then copied to where they are asked for.

    Args:
        names: of the drafters.
        vllm_config: vLLM's.
        device: where drafting runs.
    """

    def __init__(self, names: tuple[str, ...], vllm_config: Any, device: torch.device) -> None:
        self._counts = torch.zeros(2, len(names), dtype=torch.int64, device=device)
        self._drafters = torch.arange(len(names), device=device)
        self._copied = 0.0
        self._shared: Counters | None = None
        if get_tensor_model_parallel_rank() == 0:  # all ranks of an engine draft the same
            engine = vllm_config.parallel_config.data_parallel_index
            self._shared = Counters(names, engine)

    def add(self, picks: torch.Tensor, drafted: torch.Tensor, accepted: torch.Tensor) -> None:
        """Count drafts that were verified.

        Args:
            picks: (n, L) int64: whose each token was.
            drafted, accepted: (n,) integers: how many of the first of them were verified and
                accepted.
        """
        ours = picks[..., None] == self._drafters
        at = torch.arange(picks.shape[1], device=picks.device)
        for row, counted in enumerate((drafted, accepted)):
            self._counts[row] += (ours & (at < counted[:, None])[..., None]).sum(dim=(0, 1))
        now = time.monotonic()
        on_cpu = self._counts.device.type == "cpu"
        if self._shared is not None and (on_cpu or now - self._copied > _PERIOD):
            self._shared.counts[:] = self._counts.cpu().numpy()
            self._copied = now


class _Enough(Exception):  # noqa: N818 (nothing is wrong)
    """The rest of a draft is not worth its time."""


@dataclass(frozen=True)
class _Verified:
    """What became of the last proposal.

    Args:
        at: (m,) int64: which of the batch's requests had some of it verified.
        rows: (m,) int64: where these were in it.
        accepted: (m,) integers: how many of its tokens were accepted.
    """

    at: torch.Tensor
    rows: torch.Tensor
    accepted: torch.Tensor


class ComposedProposer(EagleProposer):
    """Of the older runner."""

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner=runner)
        # What "eagle3" adds in the base class is for vLLM's own drafters, by their classes. That
        # the target gives states of several layers is settled by now.
        self.method = "eagle"
        self._draft_to_the_end()
        if device.type == "cpu":
            mend()
        self.runner = runner
        # Asks `get_top_tokens`, which knows draft vocabularies, where no distribution is wanted.
        self.use_local_argmax_reduction = True
        self._slots = Slots(self.max_batch_size)
        self._picks: list[torch.Tensor] = []  # by step, (n,)
        self._rows: dict[str, int] = {}  # of the last proposal, by request
        self._drafted: list[tuple[torch.Tensor, torch.Tensor | None]] = []  # tokens, distributions
        self._likely: torch.Tensor | None = None  # (n,): log-probabilities that all of it is right
        self._last: torch.Tensor | None = None  # (n, L): that proposal
        self._verified: _Verified | None = None
        self._least: float | None = None  # log-probability below which a draft ends
        self._lookups: Lookups | None = None
        self._emitted: dict[str, list[int]] = {}  # in this step, and not yet in the runner's texts

    def _draft_to_the_end(self) -> None:
        """Have the runner ask for drafts until a request is as long as the target's may be.

        It asks for none, of any request in a batch, when one of them is a draft away from the
        drafters' longest: it puts zeros there, which nobody has drafted and vLLM counts, and
        drafters never see the tokens of these steps. Nothing requires that here: what a draft
        has beyond the end is neither written to a cache nor verified.
        """
        asked = self.speculative_config.max_model_len
        if asked is not None and asked < self.max_model_len:
            raise ValueError(
                f"`max_model_len` of the speculative configuration is {asked}, expected none: "
                f"drafters draft for all of the target's {self.max_model_len} tokens."
            )
        longest = self.max_model_len + self.num_speculative_tokens
        self.draft_model_config.max_model_len = longest

    def load_model(self, target_model: torch.nn.Module) -> None:
        """As the base class, and then what needs the target's head."""
        super().load_model(target_model)
        drafting, names = self.model.composition.drafting, self.model.composition.names
        # Elsewhere the host would have to wait for what it asks; and engines that run side by side
        # must make the same passes.
        alone = self.vllm_config.parallel_config.data_parallel_size == 1
        if self.device.type == "cpu" and alone:
            if drafting.stop_below:
                self._least = math.log(drafting.stop_below)
            # What is looked up has no distribution that it could be compared by.
            if drafting.lookup and not self._enable_probabilistic_draft_probs:
                self._lookups, names = Lookups(), (*names, LOOKUP)
        self.model.begin(self.max_batch_size, lookup=self._lookups is not None)
        self._tally = _Tally(names, self.vllm_config, self.device)

    def set_inputs_first_pass(
        self, *args: Any, target_hidden_states: torch.Tensor, **kwargs: Any
    ) -> Any:
        """As the base class, with what each drafter makes of the target's features."""
        each = self.model.combine_hidden_states(target_hidden_states)
        return super().set_inputs_first_pass(*args, target_hidden_states=each, **kwargs)

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        *args: Any,
        next_token_ids: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the base class, noting whose each token is.

        Where no drafts are wanted, since the load is high, and there are no prompts to read,
        nothing runs: the base class would have drafters read along. What has been answered
        meanwhile they do not know when drafting begins again, and foresee less for a while.
        (Prompts are read: vLLM's cache of prefixes gives them to later requests, too.)
        """
        verified, self._verified = self._verified, None
        if not num_speculative_tokens and len(target_token_ids) == self.runner.input_batch.num_reqs:
            self.num_speculative_tokens, self._last_draft_probs, self._picks = 0, None, []
            if self._lookups is not None:
                self._lookups.forget(self.runner.requests)
            return target_token_ids.new_empty(len(target_token_ids), 0, dtype=torch.int64)
        requests = list(self.runner.input_batch.req_ids)
        router = self.model.router
        if router.remembers:
            slots, new = (
                torch.tensor(x, dtype=torch.int64, device=self.device)
                for x in self._slots.of(requests, self.runner.requests)
            )
            router.follow(slots, new)
            if verified is not None and router.per_draft:
                self._hear(slots, verified, next_token_ids)
        self._picks, self._rows = [], {request: row for row, request in enumerate(requests)}
        self._drafted, self._likely = [], None
        router.begin(self._offered(requests, num_speculative_tokens))
        try:
            self._last = super().propose(
                num_speculative_tokens,
                target_token_ids,
                *args,
                next_token_ids=next_token_ids,
                **kwargs,
            )
        except _Enough:  # the base class knows no other way out
            self._last = self._as_it_is()
        self._drafted = []  # with distributions, which are large
        router.begin()
        return self._last

    def _offered(self, requests: list[str], length: int) -> Best | None:
        """What may follow in the texts of requests whose prompts have been read."""
        if self._lookups is None or not length:
            return None
        for request, tokens in self._emitted.items():
            known = self.runner.requests[request]
            text = (known.prompt_token_ids or [], known.output_token_ids, tokens)
            self._lookups.read(request, *text)
        self._lookups.forget(self.runner.requests)
        return Best(*self._lookups.offer(requests, length))

    def _as_it_is(self) -> torch.Tensor:
        """(n, L): the draft so far; distributions go where the base class keeps them."""
        tokens, distributions = zip(*self._drafted)
        if distributions[0] is not None:
            self._last_draft_probs = torch.stack(distributions, dim=1).contiguous()
        return torch.stack(tokens, dim=1)

    def _hear(self, slots: torch.Tensor, verified: _Verified, next_token_ids: torch.Tensor) -> None:
        """Say what the first tokens of the last drafts were to be.

        Args:
            slots: (n,) int64: of the requests.
            verified: what became of their drafts.
            next_token_ids: (n,): the target's own tokens after what was accepted.
        """
        own = next_token_ids[verified.at]
        emitted = torch.where(verified.accepted > 0, self._last[verified.rows, 0], own)
        self.model.router.hear(verified.rows, slots[verified.at], emitted)

    def _sample_draft_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class, noting whose the tokens are, and how likely they are all right.

        Raises:
            _Enough: if no draft in the batch is likely enough to go on. The tokens just sampled are
                part of it, whatever they are: what is verified must not depend on them, or texts
                would not have the target's distribution any more.
        """
        sampled = super()._sample_draft_tokens(*args, **kwargs)
        router = self.model.router
        self._note(*sampled, router.picks, router.chosen.confidences)
        if (rest := router.rest()) is not None:  # nobody needs to run for what is known
            for tokens, confidences in zip(rest.tokens.t(), rest.confidences.t()):
                if self._is_enough():
                    break
                self._note(tokens, None, router.picks, confidences)
            raise _Enough
        if self._is_enough() and len(self._drafted) < self.num_speculative_tokens:
            raise _Enough
        return sampled

    def _note(
        self,
        tokens: torch.Tensor,
        distributions: torch.Tensor | None,
        picks: torch.Tensor,
        confidences: torch.Tensor,
    ) -> None:
        self._picks.append(picks)
        if self._can_end:
            self._drafted.append((tokens, distributions))
            self._likely = confidences if self._likely is None else self._likely + confidences

    @property
    def _can_end(self) -> bool:
        """Whether drafts may be shorter than vLLM asks for."""
        return self._least is not None or self._lookups is not None

    def _is_enough(self) -> bool:
        return self._least is not None and float(self._likely.max()) < self._least

    def prepare_next_token_ids_padded(
        self, sampled_token_ids: Any, requests: Any, gpu_input_batch: Any, discard_request_mask: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the base class, noting what was emitted: it is not in the runner's texts yet."""
        if self._lookups is not None:
            rows = sampled_token_ids.tolist()
            kept = (~discard_request_mask).tolist()
            self._emitted = {
                request: [token for token in tokens if token >= 0]
                for request, tokens, keep in zip(gpu_input_batch.req_ids, rows, kept)
                if keep
            }
        return super().prepare_next_token_ids_padded(
            sampled_token_ids, requests, gpu_input_batch, discard_request_mask
        )

    def prepare_next_token_ids_cpu(
        self, sampled_token_ids: Any, requests: Any, gpu_input_batch: Any, scheduled: Any
    ) -> torch.Tensor:
        """The same, without padding: then it is there already."""
        if self._lookups is not None:
            emitted = zip(gpu_input_batch.req_ids, sampled_token_ids)
            self._emitted = {request: [] for request, tokens in emitted if tokens}
        return super().prepare_next_token_ids_cpu(
            sampled_token_ids, requests, gpu_input_batch, scheduled
        )

    def prepare_inputs_padded(
        self, common_attn_metadata: Any, spec_decode_metadata: Any, valid_sampled_tokens_count: Any
    ) -> Any:
        """As the base class; the last drafts have just been verified, and are counted."""
        self._count(spec_decode_metadata.num_draft_tokens, valid_sampled_tokens_count - 1)
        return super().prepare_inputs_padded(
            common_attn_metadata, spec_decode_metadata, valid_sampled_tokens_count
        )

    def prepare_inputs(
        self, common_attn_metadata: Any, sampled_token_ids: Any, num_draft_tokens: Any
    ) -> Any:
        """The same, without padding."""
        accepted = [len(tokens) - 1 for tokens in sampled_token_ids]
        self._count(num_draft_tokens, torch.tensor(accepted, device=self.device))
        return super().prepare_inputs(common_attn_metadata, sampled_token_ids, num_draft_tokens)

    def _count(self, drafted: list[int], accepted: torch.Tensor) -> None:
        """Count the last proposal.

        Requests that were not in it have no drafts, or older ones that are not counted.
        """
        if not self._picks:
            return
        requests = self.runner.input_batch.req_ids
        drafted = [n if request in self._rows else 0 for request, n in zip(requests, drafted)]
        some = [at for at, n in enumerate(drafted) if n]
        if not some:
            return
        at, rows, lengths = (
            torch.tensor(x, device=self.device)
            for x in (some, [self._rows[requests[i]] for i in some], [drafted[i] for i in some])
        )
        accepted = torch.minimum(accepted[at], lengths)
        self._verified = _Verified(at, rows, accepted)
        self._tally.add(torch.stack(self._picks, dim=1)[rows], lengths, accepted)


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
        self._tally = _Tally(model.composition.names, self.vllm_config, self.device)
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


OURS = {"EagleProposer": ComposedProposer, "EagleSpeculator": ComposedSpeculator}
"""By the name of the class whose place they take."""
