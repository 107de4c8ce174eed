"""A head whose rows are split over the ranks of a process group: whose they are, and what ranks tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Shard(NamedTuple):
    """This rank's rows of a head as plain tensors, and where the others are."""

    weight: Tensor  # (V_r, D)
    bias: Tensor | None  # (V_r)
    group: str  # the process group's name
    sizes: tuple[int, ...]  # rows of every rank; empty where ranks have to ask each other


def shard_of(weight: Tensor, bias: Tensor | None, group: Any) -> Shard:
    """A plain shard with its group, or a DTensor's, which knows all shards.

    Raises:
        RuntimeError: without a process group, or for a DTensor that is not split by rows over one dimension.
        ValueError: for a rank or a DTensor outside of the group.
    """
    sizes: tuple[int, ...] = ()
    if is_distributed(weight):
        mesh = _split_by_rows("linear_weight", weight)
        if group is not None and group != mesh.get_group():
            raise ValueError(
                "group is another than that of linear_weight's mesh; leave it out, for a DTensor brings its own"
            )
        group, rows = mesh.get_group(), weight.shape[0]
        weight, sizes = _local(weight), even_sizes(rows, mesh.size())
        if weight.shape[0] != sizes[mesh.get_local_rank()]:
            raise RuntimeError(
                f"linear_weight is a DTensor of {rows} rows with {weight.shape[0]} of them here, where its own rule "
                f"has {sizes}; pass an uneven shard as a plain tensor: linear_weight.to_local() with group="
            )
    if bias is not None and is_distributed(bias):
        _split_by_rows("linear_bias", bias)
        bias = _local(bias)
    return Shard(weight, bias, _group_name(group), sizes)


def even_sizes(rows: int, ranks: int) -> tuple[int, ...]:
    """Rows of every rank as a DTensor has them: like torch.chunk, so that the last ranks may have fewer or none."""
    size = -(-rows // ranks)
    return tuple(min(size, max(0, rows - rank * size)) for rank in range(ranks))


def replicated(name: str, tensor: Tensor | None) -> Any:
    """A tensor that every rank has whole, as a plain one."""
    if tensor is None or not is_distributed(tensor):
        return tensor
    placements: Any = getattr(tensor, "placements")  # noqa: B009
    if not all(placement.is_replicate() for placement in placements):
        raise RuntimeError(
            f"{name} must be the same on all ranks, got a DTensor placed {tuple(placements)}; "
            f"{name}.redistribute(placements=[Replicate()])"
        )
    return _local(tensor)


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, without the second that importing those takes."""
    return type(tensor).__name__ == "DTensor"


def _local(tensor: Any) -> Tensor:
    return tensor.to_local()


def _split_by_rows(name: str, tensor: Any) -> Any:
    """The mesh of a DTensor that is sharded on dimension 0 of one mesh dimension."""
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    if len(placements) != 1 or not placements[0].is_shard(0):
        whole = all(placement.is_replicate() for placement in placements)
        way_out = (
            "every rank has all of it: pass its to_local() to linear_cross_entropy"
            if whole
            else "redistribute it to [Shard(0)] on a one-dimensional mesh, or pass this rank's rows as a plain tensor "
            "and the process group of the vocabulary as group="
        )
        raise RuntimeError(
            f"{name} must be a DTensor placed (Shard(dim=0),) on a one-dimensional mesh, got {placements} on a mesh "
            f"of {mesh.ndim} dimensions; {way_out}"
        )
    return mesh


def _group_name(group: Any) -> str:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "a split vocabulary needs a process group, and torch.distributed is not initialised; call "
            "torch.distributed.init_process_group first, or linear_cross_entropy where the whole weight is here"
        )
    if group is None:
        group = dist.group.WORLD
    if dist.get_rank(group) < 0:
        raise ValueError("this rank is not in group; call the loss on the ranks that hold a shard")
    return group.group_name


class Ranks(NamedTuple):
    """The ranks of a group, each with its rows of the head."""

    group: Any
    sizes: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, name: Any, sizes: Sequence[int], input: Tensor, weight: Tensor, labels: Tensor) -> Ranks:
        """Those of a group's name; where sizes are not known, every rank asks the others.

        Raises:
            RuntimeError: on every rank, where they were given different hidden states or targets.
        """
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _resolve_process_group

        group: Any = _resolve_process_group(name)
        ranks = cls(group, tuple(sizes), dist.get_rank(group))
        return ranks if sizes else ranks._replace(sizes=_asked(ranks, input, weight, labels))

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def rows(self, rank: int) -> slice:
        """A rank's rows of the whole head."""
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor of one shape, in the order of ranks."""
        import torch.distributed as dist

        tensor = tensor.contiguous()
        gathered = tensor.new_empty((dist.get_world_size(self.group), *tensor.shape))
        dist.all_gather(list(gathered.unbind(0)), tensor, group=self.group)
        return gathered

    def sum_(self, tensor: Tensor) -> None:
        """Puts the sum over ranks in the place of every rank's tensor."""
        import torch.distributed as dist

        dist.all_reduce(tensor, group=self.group)

    def whole(self, shard: Tensor) -> Tensor:
        """All rows, made of every rank's."""
        padded = shard.new_zeros((max(self.sizes), *shard.shape[1:]))
        padded[: len(shard)] = shard
        return torch.cat([rows[:size] for rows, size in zip(self.gather(padded), self.sizes)])


def _asked(ranks: Ranks, input: Tensor, weight: Tensor, labels: Tensor) -> tuple[int, ...]:
    """Rows of every rank, seen to belong to one head, one input and one target; waits for a GPU."""
    places = torch.arange(1, len(labels) + 1, device=labels.device)
    mine = [labels.new_tensor([*weight.shape, len(input)]), (labels * places).sum()[None]]
    sizes, features, rows, checksums = ranks.gather(torch.cat(mine)).t().tolist()
    for what, values in (
        ("features (the last dimension of input and linear_weight)", features),
        ("rows of input", rows),
        ("target (here: a checksum)", checksums),
    ):
        if len(set(values)) > 1:
            raise RuntimeError(
                f"every rank must be given the same {what}, got {values} on ranks 0 to {len(values) - 1}; a split "
                "vocabulary needs all of a group's rows on each of its ranks, so gather or broadcast them first"
            )
    return tuple(sizes)
