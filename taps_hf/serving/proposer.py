"""How vLLM's older runner proposes with composed drafters.

vLLM 0.32.0 has two runners: this one, `v1/worker/gpu_model_runner`, which it takes where Triton
does not work (on CPUs) or VLLM_USE_V2_MODEL_RUNNER=0 says so, and the newer one, for which see
`speculator`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.spec_decode.eagle import EagleProposer

from ..formats.composition import LOOKUP
from .batches import Batch, Rows
from .lookups import Lookups
from .routing import Best, Slots
from .sampling import PlainWithoutDrafts, mend
from .tally import Tally
from .unread import Unread

_KEPT = 512  # rows of each request that drafters may read later


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
    """See the module."""

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
        # Elsewhere the host would have to wait for where rows stand.
        self._unread = Unread(self.max_batch_size, _KEPT) if device.type == "cpu" else None

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
        self._tally = Tally(names, self.vllm_config, self.device)
        self.runner.rejection_sampler = PlainWithoutDrafts(self.runner.rejection_sampler)

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
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: Any,
        sampling_metadata: Any,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the base class, noting whose each token is.

        Where no drafts are wanted, since the load is high, hardly anything runs: the base class
        would have drafters read along. On a CPU they read later what they need, see [`Unread`];
        elsewhere what is answered meanwhile they do not know afterwards.
        """
        batch = Batch(
            Rows(
                common_attn_metadata.query_start_loc_cpu.tolist(),
                target_token_ids,
                target_positions,
                target_hidden_states,
            ),
            next_token_ids,
            token_indices_to_sample,
            num_rejected_tokens_gpu,
            common_attn_metadata,
        )
        requests = list(self.runner.input_batch.req_ids)
        slots = self._follow(requests, next_token_ids, drafts=num_speculative_tokens > 0)
        self._picks, self._rows = [], {request: row for row, request in enumerate(requests)}
        self._drafted, self._likely = [], None
        if not num_speculative_tokens:
            read = self._read_at_once(batch, slots)
        else:
            read = self._with_unread(batch, slots)
        self.num_speculative_tokens, self._last_draft_probs = num_speculative_tokens, None
        if read is None:
            return next_token_ids.new_empty(len(requests), 0, dtype=torch.int64)
        router = self.model.router
        router.begin(self._offered(requests, num_speculative_tokens))
        try:
            self._last = super().propose(
                num_speculative_tokens,
                read.rows.tokens,
                read.rows.positions,
                read.rows.states,
                read.next_tokens,
                read.sample_at,
                read.metadata,
                sampling_metadata,
                num_rejected_tokens_gpu=read.rejected,
                **kwargs,
            )
        except _Enough:  # the base class knows no other way out
            self._last = self._as_it_is()
        self._drafted = []  # with distributions, which are large
        router.begin()
        if not num_speculative_tokens:  # some may have read nothing
            return self._last.new_empty(len(requests), 0)
        return self._last

    def _follow(self, requests: list[str], next_token_ids: torch.Tensor, drafts: bool) -> list[int]:
        """Where requests are remembered; what became of their drafts is heard, too."""
        verified, self._verified = self._verified, None
        slots, new = self._slots.of(requests, self.runner.requests)
        if self._unread is not None:
            self._unread.forget(new)
        if self._lookups is not None:
            self._lookups.forget(self.runner.requests)
        router = self.model.router
        if router.remembers and (drafts or new or verified is not None):
            at, begun = (
                torch.tensor(x, dtype=torch.int64, device=self.device) for x in (slots, new)
            )
            router.follow(at, begun)
            if verified is not None and router.per_draft:
                self._hear(at, verified, next_token_ids)
        return slots

    def _read_at_once(self, batch: Batch, slots: list[int]) -> Batch | None:
        """What drafters are to read although nothing is drafted; the rest is kept.

        Prompts of which vLLM's cache of prefixes gives blocks to other requests: who gets them can
        only have them read by then. And those that are longer than what is kept.
        """
        now, n = self.runner.input_batch, len(slots)
        prompts = now.num_prompt_tokens[:n]
        is_prompt = now.num_computed_tokens_cpu[:n] < prompts
        if self._unread is None:
            return batch if is_prompt.any() else None
        cached = self.vllm_config.cache_config.enable_prefix_caching
        reads = is_prompt & (prompts >= (min(self.block_size, _KEPT) if cached else _KEPT + 1))
        if not reads.any():
            self._unread.keep(batch.rows, slots)
            return None
        which, others = (np.flatnonzero(x).tolist() for x in (reads, ~reads))
        if others:
            self._unread.keep(batch.rows.of(others), [slots[at] for at in others])
        some = batch if not others else batch.of(which, self.block_size)
        return self._with_unread(some, [slots[at] for at in which])

    def _with_unread(self, batch: Batch, slots: list[int]) -> Batch:
        """The same with what drafters have not read of these requests."""
        if self._unread is None:
            return batch
        room = self.max_num_tokens - batch.rows.starts[-1]
        earlier = self._unread.read(batch.rows, slots, room)
        return batch if earlier is None else batch.after(earlier, self.block_size)

    def _offered(self, requests: list[str], length: int) -> Best | None:
        """What may follow in the texts of requests whose prompts have been read."""
        if self._lookups is None or not length:
            return None
        for request, tokens in self._emitted.items():
            known = self.runner.requests[request]
            text = (known.prompt_token_ids or [], known.output_token_ids, tokens)
            self._lookups.read(request, *text)
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
        on_cpu, (count, most) = self.device.type == "cpu", sampled_token_ids.shape
        if on_cpu and most == 1 and not discard_request_mask[:count].any():
            # What the base class would find, without its loop over requests.
            return sampled_token_ids[:, 0], torch.ones_like(sampled_token_ids[:, 0])
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
        """As the base class; the last drafts have just been verified, and are counted.

        Where there were none nothing is to be taken away.
        """
        if self.device.type == "cpu" and not spec_decode_metadata.max_spec_len:
            return common_attn_metadata, None, None
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
