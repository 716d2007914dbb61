"""The plan: which ranks every head keeps. Immutable, JSON-serialisable, made before anything in the model changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from clover.errors import CloverError

FORMAT = 2
"""Version of plans, and of how the columns of a saved model lie; counts up when either changes."""


@dataclass(frozen=True)
class Group:
    """KV heads of one block that are stored and run together at equal sizes."""

    heads: tuple[int, ...]
    pairs: int
    """Rotary pairs kept; each is two columns of the query and of the key."""
    plain: int
    """Unrotated Q-K directions kept."""
    value: int
    """V-O directions kept."""

    @property
    def qk(self) -> int:
        """Columns of a query or a key."""
        return 2 * self.pairs + self.plain


@dataclass(frozen=True)
class BlockPlan:
    """What one attention block keeps. KV heads in no group are gone whole, with their queries and values."""

    name: str
    part: str
    queries: int
    """Query heads per KV head."""
    kv_heads: int
    qk: int
    """Original head size of queries and keys."""
    vo: int
    """Original head size of values."""
    groups: tuple[Group, ...]
    output_bias: bool
    """Whether the output projection has a bias (it takes up the value bias and the mean of what was cut)."""
    parameters: int
    """Weights and biases of the original block."""

    @property
    def qk_kept(self) -> int:
        """Q-K directions kept, over the KV heads."""
        return sum(len(g.heads) * g.qk for g in self.groups)

    @property
    def vo_kept(self) -> int:
        """V-O directions kept, over the KV heads."""
        return sum(len(g.heads) * g.value for g in self.groups)

    @property
    def query_order(self) -> list[int]:
        """The query heads that are kept, by their numbers in the original, as they lie: group by group."""
        return [h * self.queries + i for group in self.groups for h in group.heads for i in range(self.queries)]

    def spans(self) -> Iterator[tuple[Group, int, int]]:
        """Each group with the Q-K and the V-O columns of the KV heads before it, in the flat layout."""
        qk = value = 0
        for group in self.groups:
            yield group, qk, value
            qk, value = qk + len(group.heads) * group.qk, value + len(group.heads) * group.value


@dataclass(frozen=True)
class Plan:
    """The ranks of a whole model. JSON: ``Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan``."""

    blocks: tuple[BlockPlan, ...]

    def to_dict(self) -> dict:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict) -> Plan:
        """Read back what ``to_dict`` wrote.

        Raises:
            CloverError: a field is missing, unknown or contradicts another, or it is of another format.
        """
        if isinstance(data, dict) and "format" in data:
            _check_format(data["format"])
        try:
            plan = cls(tuple(_block_from_dict(b) for b in data["blocks"]))
        except (KeyError, TypeError) as error:
            raise CloverError(f"the clover plan in config.json is damaged ({error}); restore the file") from error
        plan.check("restore config.json")
        _check_format(data.get("format"))  # those of old have none
        return plan

    def check(self, remedy: str) -> None:
        """Refuse what no block can be cut to.

        Args:
            remedy: what the user is told to do.

        Raises:
            CloverError: no blocks, or sizes or heads that contradict one another.
        """
        if not self.blocks:
            raise CloverError(f"the clover plan has no blocks; {remedy}")
        for block in self.blocks:
            try:
                fine = _possible(block)
            except TypeError:  # no numbers, or not several of them
                fine = False
            if not fine:
                raise CloverError(f"the clover plan of {block.name} is impossible: {block.groups}; {remedy}")

    @property
    def qk_removed(self) -> float:
        """Share of the Q-K head directions that are gone, 0 to 1."""
        return 1 - sum(b.qk_kept for b in self.blocks) / sum(b.kv_heads * b.qk for b in self.blocks)

    @property
    def vo_removed(self) -> float:
        """Share of the V-O head directions that are gone, 0 to 1."""
        return 1 - sum(b.vo_kept for b in self.blocks) / sum(b.kv_heads * b.vo for b in self.blocks)


def _block_from_dict(data: dict) -> BlockPlan:
    groups = tuple(Group(**(g | {"heads": tuple(g["heads"])})) for g in data["groups"])
    return BlockPlan(**(data | {"groups": groups}))


def _check_format(written: object) -> None:
    if written != FORMAT:
        raise CloverError(
            f"the clover plan has format {written!r}, and this version reads {FORMAT}; install the version that "
            "wrote it, or prune the original model again"
        )


def _possible(block: BlockPlan) -> bool:
    """Whether every group has heads, each its own, and sizes that the block's heads have; all numbers whole."""
    numbers = (block.queries, block.kv_heads, block.qk, block.vo, block.parameters)
    counts = (n for g in block.groups for n in (*g.heads, g.pairs, g.plain, g.value))
    names = isinstance(block.name, str) and isinstance(block.part, str) and isinstance(block.output_bias, bool)
    if not names or any(type(n) is not int for n in (*numbers, *counts)) or min(numbers) < 0:
        return False
    heads = [h for g in block.groups for h in g.heads]
    sizes = all(
        g.heads and min(g.pairs, g.plain) >= 0 and 0 < g.qk <= block.qk and 0 < g.value <= block.vo
        for g in block.groups
    )
    there = all(0 <= head < block.kv_heads for head in heads)
    return bool(heads) and sizes and there and len(set(heads)) == len(heads)


@dataclass(frozen=True)
class Spectrum:
    """One block's directions for people to look at: a row per KV head, each sorted from large to small."""

    name: str
    part: str
    qk: tuple[tuple[float, ...], ...]
    """Singular values of ``W_q^T W_k`` in the metric in use (under RoPE: the root of what each pair costs)."""
    vo: tuple[tuple[float, ...], ...]
    qk_norms: tuple[tuple[float, ...], ...]
    """``||w_q|| ||w_k||`` of each original head dimension: vanilla pruning's view (Figure 2 of the paper)."""
    vo_norms: tuple[tuple[float, ...], ...]
