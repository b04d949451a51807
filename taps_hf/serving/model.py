"""The draft model that vLLM builds of a composed folder.

Its hidden states are those of the K drafters side by side, (n, K * hidden). Each drafter has an
attention layer of vLLM's with an index of its own, behind those of the target, and so a key-value
cache of its own. What they compute is in `stacked` (EAGLE-2, HASS) and `stacked3` (EAGLE-3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..formats.composition import Composition
from ..formats.reading import EXTRA
from .heads import StackedHead
from .routing import Router, best_tokens, of_chosen
from .stacked import StackedTrunks
from .stacked3 import StackedEagle3
from .stacks import Apply, LayerShape, Loading, Part, StackedLinear, alone, by_drafter
from .versions import check_version

check_version()  # before anything that another version may have moved

from vllm.compilation.decorators import support_torch_compile  # noqa: E402
from vllm.config import VllmConfig  # noqa: E402
from vllm.distributed import (  # noqa: E402
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention  # noqa: E402
from vllm.model_executor.layers.logits_processor import LogitsProcessor  # noqa: E402
from vllm.model_executor.layers.rotary_embedding import get_rope  # noqa: E402
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import (  # noqa: E402
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

_NAME = re.compile(r"drafters\.(\d+)\.(.+)")


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "hidden_states": 0})
class ComposedTrunks(nn.Module):
    """Projections and layers of all drafters, with the target's embedding.

    Args:
        vllm_config: vLLM's, of the target, with the draft model's configuration in it.
        prefix: of the names of modules.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        composition = Composition.of(getattr(config, EXTRA, None))
        part = Part(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        dialect = composition.eagle3
        shape = LayerShape(
            hidden=composition.hidden_size,
            middle=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head=config.head_dim,
            eps=config.rms_norm_eps,
            qkv_bias=composition.qkv_bias,
            qk_norm=dialect is not None and dialect.qk_norm,
        )
        # The target's takes its place when both are loaded.
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, shape.hidden, prefix=f"{prefix}.embed_tokens"
        )
        self.trunks: StackedTrunks | StackedEagle3
        if dialect is None:
            biases, norm = composition.fc_biases, composition.input_norm
            self.trunks = StackedTrunks(shape, biases, norm, part)
        else:
            self.trunks = StackedEagle3(shape, dialect, part)
        self.rotary = get_rope(
            shape.head,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            is_neox_style=True,
        )
        behind = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        self.attention = nn.ModuleList(
            Attention(
                shape.heads // part.size,
                shape.head,
                shape.head**-0.5,
                num_kv_heads=self.trunks.layer.kv_size // shape.head,
                cache_config=vllm_config.cache_config,
                prefix=f"{prefix}.layers.{behind + k}.self_attn.attn",
            )
            for k in range(self.trunks.count)
        )
        self._each: list[StackedTrunks | StackedEagle3] = []

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, K * hidden), twice: what tokens are scored from, and what is fed back."""
        embeds = self.embed_tokens(input_ids)
        if not self._each:
            return self._run(self.trunks, self.attention, embeds, positions, hidden_states)
        states = by_drafter(hidden_states, self.trunks.count)
        found = [self._alone(k, embeds, positions, own) for k, own in enumerate(states)]
        scored, fed = (torch.cat(each, dim=1) for each in zip(*found))
        return scored, fed

    def separate(self) -> None:
        """Compute one drafter after the other from now on.

        A CPU wins nothing by fewer calls, and loses the time to put what they give together.
        """
        self._each = [alone(self.trunks, k) for k in range(self.trunks.count)]

    def run_alone(
        self,
        drafter: int,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, hidden), twice: as [`forward`], of one drafter, from its own states (n, hidden)."""
        return self._alone(drafter, self.embed_tokens(input_ids), positions, hidden_states)

    def _alone(
        self, drafter: int, embeds: torch.Tensor, positions: torch.Tensor, states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attention = [self.attention[drafter]]
        return self._run(self._each[drafter], attention, embeds, positions, states)

    def _run(
        self,
        trunks: StackedTrunks | StackedEagle3,
        attention: Sequence[Attention],
        embeds: torch.Tensor,
        positions: torch.Tensor,
        states: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # All have the same positions, so that all heads are turned at once.
            q, k = (x.transpose(0, 1).flatten(1) for x in (q, k))
            q, k = self.rotary(positions, q, k)
            queries, keys = (x.chunk(len(attention), dim=1) for x in (q, k))
            return torch.stack(
                [
                    layer(q.contiguous(), k.contiguous(), v.contiguous())
                    for layer, q, k, v in zip(attention, queries, keys, v.unbind())
                ]
            )

        return trunks(embeds, states, attend, tensor_model_parallel_all_reduce)


class ComposedForCausalLM(nn.Module):
    """Drafters that propose together, of a composed folder of either architecture.

    Args:
        vllm_config: as [`ComposedTrunks`].
        prefix: of the names of modules.

    Raises:
        ValueError: if the drafters do not fit the target, or vLLM is to do what they cannot.
    """

    # Read by vLLM: both are the target's.
    has_own_lm_head = False
    has_own_embed_tokens = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.speculative_config.draft_model_config.hf_config
        self.composition = Composition.of(getattr(self.config, EXTRA, None))
        self.count = len(self.composition.names)
        _check(self.composition, self.config, vllm_config)
        self.model = ComposedTrunks(
            vllm_config=vllm_config, prefix=f"{prefix}.model" if prefix else "model"
        )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.head = _head(self.composition, self.config)
        self._heads: list[StackedHead] = []  # of each drafter, where one may draft alone
        self.router: Router | None = None

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(n, hidden) from (n,)."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`ComposedTrunks`]."""
        if inputs_embeds is not None:
            raise ValueError("The drafters read tokens, but vLLM gives embeddings (of images?).")
        if (drafter := self.router.alone) is None:
            return self.model(input_ids, positions, hidden_states)
        place = self._place(drafter)
        own = hidden_states[:, place]
        scored, fed = self.model.run_alone(drafter, input_ids, positions, own)
        wide = _with(hidden_states, place, scored)
        return wide, wide if fed is scored else _with(hidden_states, place, fed)

    def _place(self, drafter: int) -> slice:
        """Where a drafter's states are among all of them."""
        width = self.composition.hidden_size
        return slice(drafter * width, (drafter + 1) * width)

    def combine_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(n, K * hidden): what the drafters make of what vLLM gives them of the target."""
        return self.model.trunks.combine(hidden_states)

    def begin(self, most_requests: int, lookup: bool = False) -> None:
        """Get ready, when the drafters are loaded and vLLM has shared the target's head.

        Args:
            most_requests: in a batch, of which routing per request and per draft remember each.
            lookup: whether drafts out of requests' own texts will be offered.
        """
        device = self.model.trunks.fc.weight.device
        if self.head is not None and not self.head.own:
            self._copy_rows()
        on_cpu, routing = device.type == "cpu", self.composition.drafting.routing
        kept = (self.count, most_requests, device)
        self.router = Router(routing, *kept, can_be_alone=on_cpu, lookup=lookup)
        if not on_cpu:
            return
        for module in self.modules():
            if isinstance(module, StackedLinear):
                module.separate(_product)
        self.model.separate()
        if self.head is not None:
            self._heads = [alone(self.head, k) for k in range(self.count)]

    def _copy_rows(self) -> None:
        head, ids = self.lm_head, self.head.token_ids
        if not isinstance(head.quant_method, UnquantizedEmbeddingMethod):
            raise ValueError(
                f"The target's head is quantised ({type(head.quant_method).__name__}), but "
                "drafters with draft vocabularies copy rows of it; export them without."
            )
        # Of a vocabulary that is split each process has some rows; the sum has all of them.
        first, last = (
            getattr(head.shard_indices, f"org_vocab_{edge}_index") for edge in ("start", "end")
        )
        here = (ids >= first) & (ids < last)
        local = (ids - first).clamp(0, last - first - 1)
        rows = head.weight.data[local] * here[..., None].to(head.weight.dtype)
        self.head.copy_rows(tensor_model_parallel_all_reduce(rows))

    @property
    def token_ids(self) -> torch.Tensor | None:
        """(K, scored) int64; None where all tokens are scored."""
        return None if self.head is None else self.head.token_ids

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(n,) int64: the token that is proposed after each row of (n, K * hidden)."""
        self.router.choose(best_tokens(*self._scores(hidden_states)))
        return self.router.chosen.tokens

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(n, vocabulary): what the chosen drafter scores; -inf for tokens that it does not."""
        logits, token_ids = self._scores(hidden_states)
        self.router.choose(best_tokens(logits, token_ids))
        picks = self.router.picks
        scores = of_chosen(logits, picks)
        if self.token_ids is None:
            return scores
        full = scores.new_full((len(scores), self.config.vocab_size), float("-inf"))
        # Of tokens that fill up a shorter vocabulary the score is -inf: they change nothing.
        return full.scatter_reduce_(1, self.token_ids[picks], scores, "amax")

    def _scores(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (K, n, scored) and of which tokens (K, scored), None for all of the target's.

        Of the one who drafts alone they are (1, n, scored) and (1, scored).
        """
        each, head, token_ids = by_drafter(hidden_states, self.count), self.head, self.token_ids
        if (drafter := self.router.alone) is not None:
            each, head = each[drafter, None], self._heads[drafter] if self._heads else None
            token_ids = None if token_ids is None else token_ids[drafter, None]
        if head is not None:
            return head(each), token_ids
        logits = self.logits_processor(self.lm_head, each.flatten(0, 1))
        return logits.view(*each.shape[:2], -1), None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take the tensors of a folder; returns the names of the parameters that have them."""
        parts = [self.model.trunks] if self.head is None else [self.model.trunks, self.head]
        loading = Loading(self.count, *parts)
        for name, tensor in weights:
            found = _NAME.fullmatch(name)
            if found is None:
                raise ValueError(f"{name} is no tensor of composed drafters.")
            loading.take(int(found[1]), found[2], tensor)
        loading.check()
        # vLLM asks for all parameters, also for those whose place the target's take.
        return {name for name, _ in self.named_parameters()}


def _with(states: torch.Tensor, place: slice, own: torch.Tensor) -> torch.Tensor:
    """States of all drafters with those of one in their place."""
    wide = states.clone()
    wide[:, place] = own
    return wide


def _product(weight: torch.Tensor) -> Apply:
    """The product with a weight (out, in), as vLLM's own linear layers compute it on this CPU."""
    layer = nn.Module()
    layer.weight, layer.bias = nn.Parameter(weight.clone(), requires_grad=False), None
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)  # unless it goes on using that
    return lambda x: layer.cpu_linear(x, layer.weight, None)


def _head(composition: Composition, config: Any) -> StackedHead | None:
    """Of drafters that score with rows of their own, or with some of the target's."""
    sizes, own = composition.draft_vocab_sizes, composition.eagle3 is not None
    if sizes is None and not own:
        return None
    every = (config.vocab_size,) * len(composition.names)
    return StackedHead(composition.hidden_size, sizes or every, sizes is not None, own)


def _check(composition: Composition, config: Any, vllm_config: VllmConfig) -> None:
    """Raise `ValueError` for a target or settings that these drafters cannot draft with."""
    target = vllm_config.model_config
    trained_for = composition.target or "another target"
    for name, found, expected in (
        ("hidden_size", target.get_hidden_size(), composition.hidden_size),
        ("vocab_size", target.get_vocab_size(), config.vocab_size),
    ):
        if found != expected:
            raise ValueError(
                f"The target's `{name}` is {found}, but the drafters' is {expected}: they were "
                f"made for {trained_for}."
            )
    asked = vllm_config.speculative_config.method
    if asked != composition.method:
        raise ValueError(
            f"`method` of the speculative configuration is {asked!r}, expected "
            f"{composition.method!r} for these drafters."
        )
    layers = target.get_total_num_hidden_layers()
    if composition.eagle3 is not None and composition.eagle3.read[-1] > layers:
        raise ValueError(
            f"The drafters read `hidden_states` {composition.eagle3.read} of the target, which has "
            f"{layers} layers: they were made for {trained_for}."
        )
    if config.hidden_size != len(composition.names) * composition.hidden_size:
        raise ValueError(
            f"`hidden_size` is {config.hidden_size}, expected {composition.hidden_size} for each "
            f"of {len(composition.names)} drafters."
        )
    if get_pp_group().world_size > 1:
        raise ValueError(
            "`pipeline_parallel_size` is more than 1, but drafters read the embedding and the "
            "head of the target, which are not in one process then."
        )
    if vllm_config.speculative_config.draft_model_config.quantization is not None:
        raise ValueError("The drafters are to be quantised, expected them as they are.")
