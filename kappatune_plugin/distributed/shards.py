"""Where a weight is: whole in this process, or in parts over the ranks of a DeepSpeed ZeRO-3 or FSDP2 run.

The one module that knows. Both frameworks cut a weight into consecutive ranges of its flattened values, one a rank. A
block of a weight (one expert's projection), flattened too, is then cut into consecutive ranges as well. So whatever has
to be done (gather a block, write one, bring trained values to where the base is) is one exchange of ranges.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from kappatune_plugin.distributed.ranks import rank, switched_on, world
from kappatune_plugin.errors import KappaTuneError

Index = tuple[int | slice, ...]
Range = tuple[int, int]
NOTHING = (0, 0)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether this process holds only its part of `parameter`."""
    return hasattr(parameter, "ds_tensor") or isinstance(parameter, DTensor)


def is_stepped_elsewhere(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO optimizes copies of `parameter`, so that its optimizer never holds the parameter."""
    return hasattr(parameter, "ds_tensor") or hasattr(parameter, "_hp_mapping")


def gather_while_running(module: nn.Module, parameter: Tensor) -> None:
    """Have ZeRO-3 gather `parameter` whenever `module` runs, forward or backward, from now on.

    autograd wants a gradient to have its parameter's shape, and a trained slice belongs to a module that never runs.
    Collective the first time.
    """
    if hasattr(parameter, "ds_tensor") and parameter.ds_id not in module.__dict__.get("_external_params", {}):
        import deepspeed

        deepspeed.zero.register_external_parameter(module, parameter)
        parameter.all_gather()


def shards_with_fsdp() -> bool:
    """Whether accelerate shards the model with FSDP when training starts."""
    return world() > 1 and switched_on("ACCELERATE_USE_FSDP")


def first_rank_loads() -> bool:
    """Whether the weights are on the first rank only, and on the meta device elsewhere, until FSDP2 shards them.

    That is accelerate's `fsdp_cpu_ram_efficient_loading`.
    """
    return shards_with_fsdp() and switched_on("FSDP_CPU_RAM_EFFICIENT_LOADING")


def layout(parameter: Tensor) -> Tensor:
    """`parameter`, or for one in parts a tensor without storage of its whole shape; ZeRO-3 shows the shape (0,)."""
    if not is_partitioned(parameter):
        return parameter
    return torch.empty(getattr(parameter, "ds_shape", parameter.shape), dtype=parameter.dtype, device="meta")


def block_shape(parameter: Tensor, index: Index) -> torch.Size:
    """The shape of `parameter[index]`."""
    return _block(layout(parameter), index).shape


def read_block(parameter: Tensor, index: Index) -> Tensor:
    """What this process holds of `parameter[index]`, a copy: all of it in its shape, or flat its range of it."""
    return _held(parameter, index).clone()


@torch.no_grad()
def write_block(parameter: Tensor, index: Index, values: Tensor) -> None:
    """Write `values`, as `read_block` gives them, to where this process holds `parameter[index]`. Collective."""
    if not is_partitioned(parameter):
        _block(parameter.detach(), index).copy_(values.view(block_shape(parameter, index)))
        return
    done = 0
    for view in _local_views(parameter, index):
        view.copy_(values[done : done + view.numel()].view(view.shape))
        done += view.numel()
    if hasattr(parameter, "ds_tensor") and parameter.shape == parameter.ds_shape:
        # ZeRO-3 keeps small weights whole beside their parts ("persistent")
        _block(parameter.data, index).copy_(whole_block(parameter, index))


def whole_block(parameter: Tensor, index: Index, owner: int | None = None) -> Tensor | None:
    """`parameter[index]`, gathered on the rank `owner` and None elsewhere, or on all ranks without one. Collective.

    Needs memory for this block on the ranks that get it. A weight that isn't partitioned is not copied.
    """
    mine = owner is None or owner == rank()
    if is_partitioned(parameter):
        shape = block_shape(parameter, index)
        everything = (0, shape.numel())
        wanted = [everything if owner is None or each == owner else NOTHING for each in range(world())]
        gathered = redistribute(_held(parameter, index), block_ranges(parameter, index), wanted)
        return gathered.view(shape) if mine else None
    return _block(parameter.detach(), index) if mine else None


def block_ranges(parameter: Tensor, index: Index) -> list[Range]:
    """For each rank the range that it holds of the flattened `parameter[index]`."""
    count = block_shape(parameter, index).numel()
    if not is_partitioned(parameter):
        return [(0, count)] * world()
    rows, columns, width = _grid(layout(parameter).shape, index)

    def before(position: int) -> int:
        """How many values of the block come before `position` of the flattened parameter."""
        row, column = divmod(position, width)
        return _below(rows, row) * len(columns) + (_below(columns, column) if row in rows else 0)

    return [(before(start), before(stop)) for start, stop in _ranges(parameter)]


@torch.no_grad()
def redistribute(values: Tensor, held: Sequence[Range], wanted: Sequence[Range]) -> Tensor:
    """Bring the flat ranges of one tensor from where they are to where they are wanted. Collective.

    Args:
        values: those of the range `held[rank()]`.
        held, wanted: a range a rank, the same lists on all of them. What several hold is sent by the first of them.

    Returns:
        The values of `wanted[rank()]`, flat, on the device of `values`.
    """
    me, start = rank(), held[rank()][0]
    values = values.detach().reshape(-1)
    if all(_overlap(have, want) == want for have, want in zip(held, wanted, strict=True)):
        return values[wanted[me][0] - start : wanted[me][1] - start]
    sources = [each if each not in held[:position] else NOTHING for position, each in enumerate(held)]
    sent = [_overlap(sources[me], each) for each in wanted]
    received = [_overlap(each, wanted[me]) for each in sources]
    pieces = [values[low - start : high - start] for low, high in sent if low < high]
    device, dtype, size = values.device, values.dtype, values.element_size()
    given = (pieces[0] if len(pieces) == 1 else torch.cat([values[:0], *pieces])).contiguous().to(_link(device))
    taken = torch.empty(sum(high - low for low, high in received), dtype=dtype, device=given.device)
    # as bytes, since not every backend knows every dtype
    dist.all_to_all_single(
        taken.view(torch.uint8),
        given.view(torch.uint8),
        [(high - low) * size for low, high in received],
        [(high - low) * size for low, high in sent],
    )
    return taken.to(device)


def _overlap(one: Range, other: Range) -> Range:
    low, high = max(one[0], other[0]), min(one[1], other[1])
    return (low, high) if low < high else NOTHING


def _link(device: torch.device) -> torch.device:
    """Where tensors of `device` have to be to be sent: NCCL doesn't know the CPU, where offloaded weights are."""
    if dist.get_backend() != "nccl" or device.type != "cpu":
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _block(whole: Tensor, index: Index) -> Tensor:
    return whole[index] if index else whole


def _held(parameter: Tensor, index: Index) -> Tensor:
    """As `read_block`, a view where that can be."""
    if not is_partitioned(parameter):
        return _block(parameter.detach(), index)
    views = [view.reshape(-1) for view in _local_views(parameter, index)]
    return views[0] if len(views) == 1 else torch.cat([_local(parameter)[:0], *views])


def _ranges(parameter: Tensor) -> list[Range]:
    """For each rank the range that it holds of the flattened `parameter`."""
    if isinstance(parameter, DTensor):
        return _fsdp2_ranges(parameter)
    if getattr(parameter, "ds_secondary_tensor", None) is not None:
        raise KappaTuneError("ZeRO++'s second copy of the weights isn't supported: delete zero_hpz_partition_size.")
    count, size = parameter.ds_numel, parameter.ds_tensor.numel()
    parts = dist.get_world_size(parameter.ds_process_group)
    starts = [min(each % parts * size, count) for each in range(world())]
    return [(start, min(start + size, count)) for start in starts]


def _fsdp2_ranges(parameter: DTensor) -> list[Range]:
    sharded = [axis for axis, placement in enumerate(parameter.placements) if isinstance(placement, Shard)]
    if len(sharded) != 1 or parameter.placements[sharded[0]].dim != 0:
        raise KappaTuneError(
            f"A weight is placed as {parameter.placements}: of the ways to divide weights only FSDP2's own, along "
            "their first axis, is supported (no tensor or expert parallelism)."
        )
    parts, rows = parameter.device_mesh.size(sharded[0]), parameter.shape[0]
    chunk, row = math.ceil(rows / parts), math.prod(parameter.shape[1:])
    where = {}
    for position in (parameter.device_mesh.mesh >= 0).nonzero().tolist():
        where[int(parameter.device_mesh.mesh[tuple(position)])] = position[sharded[0]]
    bounds = [(min(where[each] * chunk, rows), min((where[each] + 1) * chunk, rows)) for each in range(world())]
    return [(low * row, high * row) for low, high in bounds]


def _local(parameter: Tensor) -> Tensor:
    """This process's part of a partitioned parameter, flat, without padding; a view."""
    low, high = _ranges(parameter)[rank()]
    if isinstance(parameter, DTensor):
        return parameter.detach().to_local().view(-1)
    if getattr(parameter.ds_tensor.status, "name", "AVAILABLE") != "AVAILABLE":
        raise KappaTuneError("Weights offloaded to NVMe can't be trained: write offload_param.device: cpu.")
    return parameter.ds_tensor.detach().view(-1)[: high - low]


def _local_views(parameter: Tensor, index: Index) -> Iterator[Tensor]:
    """Views (rows, columns) into this process's part that together are its range of `parameter[index]`, in order."""
    flat = _local(parameter)
    rows, columns, width = _grid(layout(parameter).shape, index)
    low, high = _ranges(parameter)[rank()]
    for top, bottom, left, right in _bands(low, high, width):
        inside = range(_below(rows, top), _below(rows, bottom)), range(_below(columns, left), _below(columns, right))
        if all(inside):
            start = rows[inside[0].start] * width + columns[inside[1].start] - low
            strides = (rows.step * width, columns.step)
            yield flat.as_strided([len(side) for side in inside], strides, flat.storage_offset() + start)


def _grid(shape: torch.Size, index: Index) -> tuple[range, range, int]:
    """A block of a tensor as rows and columns of the flattened tensor cut into rows of a width."""
    if not index:
        return range(1), range(shape.numel()), shape.numel()
    expert, row_slice, column_slice = index
    rows, columns = range(shape[1])[row_slice], range(shape[2])[column_slice]
    first = expert * shape[1]
    return range(first + rows.start, first + rows.stop, rows.step), columns, shape[2]


def _bands(low: int, high: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """A flat range as at most three rectangles (top, bottom, left, right) of rows of `width`, in order."""
    first, left = divmod(low, width)
    last, right = divmod(high, width)
    if first == last:
        yield first, first + 1, left, right
        return
    if left:
        yield first, first + 1, left, width
        first += 1
    yield first, last, 0, width
    yield last, last + 1, 0, right


def _below(numbers: range, limit: int) -> int:
    """How many of `numbers`, which rise, are below `limit`."""
    return len(range(numbers.start, min(numbers.stop, max(limit, numbers.start)), numbers.step))
