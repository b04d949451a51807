"""Draft trees as plain tensors, and how several become one.

A draft tree is a trie of proposed continuations: node 0 is the root (the last emitted token),
parents come before children, and siblings carry distinct tokens. Every node remembers which
drafters proposed it and how confident each was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class SampledProposals:
    """The proposal distributions behind a tree whose children were *sampled* from them.

    An attempt is one child drawn at one node from one drafter's distribution. Attempts at a node
    are to be tried in the order they have here.

    Args:
        parents: (attempts,) int64: the node at which the child was drawn.
        children: (attempts,) int64: the node drawn.
        rows: (attempts,) int64: the row of `probabilities` it was drawn from (without replacement
            among the attempts that share the row).
        probabilities: (rows, vocabulary) float32: the drafters' distributions.
    """

    parents: torch.Tensor
    children: torch.Tensor
    rows: torch.Tensor
    probabilities: torch.Tensor


@dataclass(frozen=True)
class DraftTree:
    """One draft tree of N nodes (the root included), proposed by D drafters.

    Args:
        tokens: (N,) int64.
        parents: (N,) int64, each smaller than the node's own index; -1 for the root.
        depths: (N,) int64, 0 for the root.
        confidence: (D, N) float32: c(v), a drafter's probability of the node's token given its
            path; NaN where that drafter did not propose the node. 1 at the root.
        path_confidence: (D, N) float32: V(v), the product of c over the path; NaN likewise.
        entropy: (D, N) float32, nats: entropy of the distribution the node was taken from; NaN
            where unknown, and at the root. None if it was not asked for.
        proposals: the distributions the nodes were sampled from; None for deterministic trees.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    confidence: torch.Tensor
    path_confidence: torch.Tensor
    entropy: torch.Tensor | None = None
    proposals: SampledProposals | None = None

    @classmethod
    def root(cls, token: torch.Tensor, num_drafters: int) -> DraftTree:
        """The tree that proposes nothing. `token`: int64 of shape (1,)."""
        zero = torch.zeros_like(token)
        ones = torch.ones(num_drafters, 1, device=token.device)
        return cls(token, zero - 1, zero, ones, ones)

    @classmethod
    def star(cls, token: torch.Tensor, leaves: int) -> DraftTree:
        """A root and its children, all one token (1,): as good as any tree to time a pass with."""
        depths = torch.ones(leaves + 1, dtype=torch.long, device=token.device)
        depths[0] = 0
        ones = torch.ones(1, leaves + 1, device=token.device)
        return cls(token.expand(leaves + 1), depths - 1, depths, ones, ones)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_drafters(self) -> int:
        return self.confidence.shape[0]

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node (reads back from the device)."""
        return int(self.depths.max())

    def proposers(self, node: int) -> tuple[int, ...]:
        """The drafters that proposed a node."""
        return tuple((~self.confidence[:, node].isnan()).nonzero().flatten().tolist())

    def children(self) -> dict[tuple[int, int], int]:
        """Nodes by parent and token, of copies the first (reads back from the device).

        The root stands under (-1, its token).
        """
        found: dict[tuple[int, int], int] = {}
        pairs = torch.stack([self.parents, self.tokens]).tolist()  # one read-back
        for node, pair in enumerate(zip(*pairs)):
            found.setdefault(pair, node)
        return found

    def of_drafter(self, index: int, num_drafters: int) -> DraftTree:
        """A tree of a drafter alone as that of one among several: (1, N) become (D, N)."""
        if num_drafters == 1:
            return self

        def spread(values: torch.Tensor, at_root: float) -> torch.Tensor:
            rows = values.new_full((num_drafters, values.shape[1]), torch.nan)
            rows[index] = values[0]
            rows[:, 0] = at_root
            return rows

        return replace(
            self,
            confidence=spread(self.confidence, 1.0),
            path_confidence=spread(self.path_confidence, 1.0),
            entropy=None if self.entropy is None else spread(self.entropy, torch.nan),
        )

    def ancestors(self) -> torch.Tensor:
        """(N, N) bool: entry [i, j] says that j lies on the path from the root to i, i included."""
        # Bytes of the host: as tensors this took some operations for each level of the tree.
        rows: list[bytearray] = []
        for node, parent in enumerate(self.parents.tolist()):
            row = bytearray(len(self)) if node == 0 else bytearray(rows[parent])
            row[node] = 1
            rows.append(row)
        reach = torch.frombuffer(bytearray().join(rows), dtype=torch.bool)
        return reach.view(len(self), len(self)).to(self.tokens.device)

    def mean_confidence(self) -> torch.Tensor:
        """(D,) float32: (1/|T|) sum of c(v) over the nodes below the root (TAPS, equation 13)."""
        return self.confidence[:, 1:].nanmean(dim=1)

    def mean_entropy(self) -> torch.Tensor:
        """(D,) float32, nats: mean draft entropy over the nodes below the root."""
        if self.entropy is None:
            raise ValueError("The tree was grown without entropies.")
        return self.entropy[:, 1:].nanmean(dim=1)

    def to(self, device: torch.device) -> DraftTree:
        """The tree on another device (itself if it is there already).

        The large `proposals.probabilities` stay where they are: few of their rows are ever read.
        """
        (moved,) = move([self], device)
        return moved

    def select(self, nodes: torch.Tensor) -> DraftTree:
        """The subtree made of `nodes`: int64, ascending, with the root and every node's parent.

        Raises:
            ValueError: for sampled trees: choosing among sampled tokens changes their distribution.
        """
        if self.proposals is not None:
            raise ValueError("The tree was sampled, expected a deterministic one to select from.")
        new_index = {node: index for index, node in enumerate(nodes.tolist())} | {-1: -1}
        parents = [new_index[parent] for parent in self.parents[nodes].tolist()]
        return DraftTree(
            tokens=self.tokens[nodes],
            parents=torch.tensor(parents, device=self.tokens.device),
            depths=self.depths[nodes],
            confidence=self.confidence[:, nodes],
            path_confidence=self.path_confidence[:, nodes],
            entropy=None if self.entropy is None else self.entropy[:, nodes],
        )

    def best(self, num_nodes: int) -> DraftTree:
        """The `num_nodes` best nodes below the root by path confidence.

        A node's path confidence never exceeds its parent's, and ties go to the earlier node, so
        what is kept is connected. With several drafters a node counts by the surest of them.
        """
        if len(self) - 1 <= num_nodes:
            return self
        value = self.path_confidence[:, 1:].nan_to_num(nan=-1.0).amax(dim=0)
        order = torch.sort(value, descending=True, stable=True).indices[:num_nodes]
        nodes = [0, *sorted(index + 1 for index in order.tolist())]
        return self.select(torch.tensor(nodes, device=order.device))


def merge(trees: Sequence[DraftTree], num_nodes: int | None = None) -> DraftTree:
    """The union of tries under the shared root: what several drafters proposed stands once.

    Args:
        trees: trees with the same root token and the same number of drafters (each tree leaves NaN
            in the rows of drafters it does not come from).
        num_nodes: keep only that many best nodes below the root; None keeps all. Not available for
            sampled trees: dropping nodes by their tokens would change what was sampled.

    Returns:
        a tree whose nodes at each depth are ordered by parent, then token. A single tree comes back
        as it is.

    Raises:
        ValueError: for no trees, or a node budget on sampled trees.
    """
    _check_mergeable(trees)
    sampled = trees[0].proposals is not None
    if sampled and num_nodes is not None:
        raise ValueError(
            f"`num_nodes` is {num_nodes}, but the trees were sampled; expected None, since "
            "choosing among sampled tokens changes their distribution."
        )
    if len(trees) == 1:
        return trees[0] if num_nodes is None else trees[0].best(num_nodes)

    packed = _side_by_side(trees)
    identity, nodes = _identify(packed)
    proposals = None
    if sampled:
        p = packed.proposals
        proposals = replace(p, parents=identity[p.parents], children=identity[p.children])
    size = len(nodes)
    union = DraftTree(
        tokens=nodes[:, 1],
        parents=nodes[:, 0],
        depths=nodes[:, 2],
        confidence=_combine(packed.confidence, identity, size),
        path_confidence=_combine(packed.path_confidence, identity, size),
        entropy=None if packed.entropy is None else _combine(packed.entropy, identity, size),
        proposals=proposals,
    )
    return union if num_nodes is None else union.best(num_nodes)


def concatenate(trees: Sequence[DraftTree]) -> DraftTree:
    """The paper's packing (TAPS, appendix A.4): the trees side by side under the shared root.

    What several drafters proposed is verified several times: siblings may carry equal tokens, and
    depths are sorted within each tree only. The first of such copies stands for all: it says who
    proposed it, and what follows any of them hangs below it. (The paper leaves each tree to itself;
    the target computes the same at equal paths, so the tokens and the nodes are the same.)
    """
    _check_mergeable(trees)
    packed = _side_by_side(trees)
    identity, nodes = _identify(packed)
    size, places = len(nodes), torch.arange(len(packed), device=packed.tokens.device)
    first = places.new_full((size,), len(packed)).scatter_reduce(0, identity, places, "amin")
    stands_for = first[identity]  # (packed nodes,): of each, the first of its copies
    is_copy = stands_for != places

    def combine(values: torch.Tensor) -> torch.Tensor:
        return values.where(is_copy, _combine(values, identity, size)[:, identity])

    parents = stands_for[packed.parents.clamp(min=0)]
    parents[0] = -1
    proposals = packed.proposals
    if proposals is not None:
        proposals = replace(
            proposals,
            parents=stands_for[proposals.parents],
            children=stands_for[proposals.children],
        )
    return replace(
        packed,
        parents=parents,
        confidence=combine(packed.confidence),
        path_confidence=combine(packed.path_confidence),
        entropy=None if packed.entropy is None else combine(packed.entropy),
        proposals=proposals,
    )


def _identify(packed: DraftTree) -> tuple[torch.Tensor, torch.Tensor]:
    """Which nodes are the same: their parents are, and their tokens.

    Returns:
        (N,) int64: for each node its index in the union; (U, 3) int64: the union's parents, tokens
        and depths.
    """
    tokens, depths = packed.tokens.tolist(), packed.depths.tolist()
    at: dict[int, list[int]] = {}
    for node, depth in enumerate(depths):
        at.setdefault(depth, []).append(node)
    parents = packed.parents.tolist()
    identity = [0] * len(tokens)
    union = [(-1, tokens[0], 0)]
    for depth in range(1, len(at)):
        pairs = [(identity[parents[node]], tokens[node]) for node in at[depth]]
        index = {pair: len(union) + i for i, pair in enumerate(sorted(set(pairs)))}
        for node, pair in zip(at[depth], pairs):
            identity[node] = index[pair]
        union += [(*pair, depth) for pair in index]
    device = packed.tokens.device
    return torch.tensor(identity, device=device), torch.tensor(union, device=device)


def _combine(values: torch.Tensor, identity: torch.Tensor, size: int) -> torch.Tensor:
    """(D, size) from (D, N): of the nodes that are the same, what is known."""
    # A drafter proposes a node at most once, so "the largest known" is "the only known".
    out = values.new_full((values.shape[0], size), -torch.inf)
    known = values.nan_to_num(nan=-torch.inf)
    out = out.scatter_reduce(1, identity.expand_as(values), known, "amax")
    return out.masked_fill(out == -torch.inf, torch.nan)


def _side_by_side(trees: Sequence[DraftTree]) -> DraftTree:
    """The trees under their shared root, each with its own nodes."""
    first = trees[0]
    tokens, parents, depths = [first.tokens[:1]], [first.parents[:1]], [first.depths[:1]]
    confidence, path_confidence = [first.confidence[:, :1]], [first.path_confidence[:, :1]]
    entropy = None if first.entropy is None else [first.entropy[:, :1]]
    proposals: list[SampledProposals] = []
    offset = rows = 0
    for tree in trees:

        def shifted(index: torch.Tensor, offset: int = offset) -> torch.Tensor:
            return torch.where(index > 0, index + offset, index)

        tokens.append(tree.tokens[1:])
        parents.append(shifted(tree.parents[1:]))
        depths.append(tree.depths[1:])
        confidence.append(tree.confidence[:, 1:])
        path_confidence.append(tree.path_confidence[:, 1:])
        if entropy is not None:
            entropy.append(tree.entropy[:, 1:])
        if tree.proposals is not None:
            p = tree.proposals
            proposals.append(
                replace(
                    p,
                    parents=shifted(p.parents),
                    children=shifted(p.children),
                    rows=p.rows + rows,
                )
            )
            rows += len(p.probabilities)
        offset += len(tree) - 1
    return DraftTree(
        tokens=torch.cat(tokens),
        parents=torch.cat(parents),
        depths=torch.cat(depths),
        confidence=torch.cat(confidence, dim=1),
        path_confidence=torch.cat(path_confidence, dim=1),
        entropy=None if entropy is None else torch.cat(entropy, dim=1),
        proposals=None
        if not proposals
        else SampledProposals(
            *(
                torch.cat([getattr(p, name) for p in proposals])
                for name in ("parents", "children", "rows", "probabilities")
            )
        ),
    )


def _check_mergeable(trees: Sequence[DraftTree]) -> None:
    if not trees:
        raise ValueError("No trees were given to merge; expected at least one.")
    if len({tree.num_drafters for tree in trees}) > 1:
        raise ValueError("The trees have different numbers of drafters; expected the same for all.")
    if len({(tree.entropy is None, tree.proposals is None) for tree in trees}) > 1:
        raise ValueError(
            "The trees differ in kind; expected all sampled or none, alike in entropy."
        )


def move_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of one device on another, in a single transfer.

    What goes to the CPU waits for the device; the other way nobody waits.
    """
    if not tensors or tensors[0].device == device:
        return list(tensors)
    # Larger elements first keeps every piece aligned.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    flat = [tensors[i].contiguous().view(torch.uint8).flatten() for i in order]
    # From pageable memory a device copies before the call returns; into it, only when it is done.
    together = torch.cat(flat).to(device, non_blocking=device.type == "cuda")
    moved = list(tensors)
    for i, piece in zip(order, together.split([len(piece) for piece in flat])):
        moved[i] = piece.view(tensors[i].dtype).view(tensors[i].shape)
    return moved


def move(trees: Sequence[DraftTree], device: torch.device) -> list[DraftTree]:
    """Trees of one device on another, as [`move_together`].

    Distributions stay where they are, as with [`DraftTree.to`].
    """
    if trees[0].tokens.device == device:
        return list(trees)
    slots = [
        (part, name)
        for tree in trees
        for part in (tree, tree.proposals)
        for name, value in ([] if part is None else vars(part).items())
        if isinstance(value, torch.Tensor) and name != "probabilities"
    ]
    pieces = move_together([getattr(part, name) for part, name in slots], device)
    found: dict[int, dict[str, torch.Tensor]] = {}
    for (part, name), piece in zip(slots, pieces):
        found.setdefault(id(part), {})[name] = piece
    moved = []
    for tree in trees:
        new = replace(tree, **found[id(tree)])
        if tree.proposals is not None:
            new = replace(new, proposals=replace(tree.proposals, **found[id(tree.proposals)]))
        moved.append(new)
    return moved
