"""Where a weight is: whole in this process, or partitioned over the ranks of a DeepSpeed ZeRO-3 or FSDP2 run.

The only module that knows. Both frameworks cut a flattened weight into consecutive ranges, one a rank. Then a block of
the weight (one expert's projection), flattened too, is also cut into consecutive ranges. So each operation (gather a
block, write one, bring trained values to where the base is) is one exchange of ranges.
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
    """Whether DeepSpeed ZeRO optimizes copies of `parameter`, so its optimizer never holds the parameter itself."""
    return hasattr(parameter, "ds_tensor") or hasattr(parameter, "_hp_mapping")


def gather_while_running(module: nn.Module, parameter: Tensor) -> None:
    """From now on let ZeRO-3 gather `parameter` whenever `module` runs, forward or backward.

    autograd expects a gradient to have its parameter's shape, and a trained slice belongs to a module that never runs.
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
    """`parameter`; for a partitioned one a meta tensor of its whole shape (ZeRO-3 shows the shape (0,))."""
    if not is_partitioned(parameter):
        return parameter
    return torch.empty(getattr(parameter, "ds_shape", parameter.shape), dtype=parameter.dtype, device="meta")


def block_shape(parameter: Tensor, index: Index) -> torch.Size:
    """The shape of `parameter[index]`."""
    return _block(layout(parameter), index).shape


def read_block(parameter: Tensor, index: Index) -> Tensor:
    """A copy of what this process holds of `parameter[index]`: its range, flat, if partitioned, else all of it."""
    return _held(parameter, index).clone()


@torch.no_grad()
def write_block(parameter: Tensor, index: Index, values: Tensor) -> None:
    """Write `values`, as `read_block` returns them, into this process's part of `parameter[index]`. Collective."""
    if not is_partitioned(parameter):
        _block(parameter.detach(), index).copy_(values.view(block_shape(parameter, index)))
        return
    done = 0
    for view in _local_views(parameter, index):
        view.copy_(values[done : done + view.numel()].view(view.shape))
        done += view.numel()
    if hasattr(parameter, "ds_tensor") and parameter.shape == parameter.ds_shape:
        # ZeRO-3 also keeps small weights whole ("persistent")
        _block(parameter.data, index).copy_(whole_block(parameter, index))


def whole_block(parameter: Tensor, index: Index, owner: int | None = None) -> Tensor | None:
    """`parameter[index]`, gathered on all ranks, or on the rank `owner` alone (None elsewhere). Collective.

    Takes memory for this block on the ranks that get it. A weight that isn't partitioned is not copied.
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
    """For each rank, the range it holds of the flattened `parameter[index]`."""
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
    """Move the flat ranges of one tensor from the ranks that hold them to those that want them. Collective.

    Args:
        values: the values of the range `held[rank()]`.
        held, wanted: one range for each rank, the same lists on all. A range that several hold is sent by the first.

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
    """The device from which tensors of `device` can be sent: NCCL can't send from the CPU (offloaded weights)."""
    if dist.get_backend() != "nccl" or device.type != "cpu":
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _block(whole: Tensor, index: Index) -> Tensor:
    return whole[index] if index else whole


def _held(parameter: Tensor, index: Index) -> Tensor:
    """As `read_block`, but a view where possible."""
    if not is_partitioned(parameter):
        return _block(parameter.detach(), index)
    views = [view.reshape(-1) for view in _local_views(parameter, index)]
    return views[0] if len(views) == 1 else torch.cat([_local(parameter)[:0], *views])


def _ranges(parameter: Tensor) -> list[Range]:
    """For each rank, the range it holds of the flattened `parameter`."""
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
            f"A weight is placed as {parameter.placements}: only FSDP2's own sharding along the first axis is "
            "supported (no tensor or expert parallelism)."
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
    """Views (rows, columns) into this process's part that make up its range of `parameter[index]`, in order."""
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
    """A block of a tensor as (rows, columns, width): a grid on the flattened tensor cut into rows of `width`."""
    if not index:
        return range(1), range(shape.numel()), shape.numel()
    *expert, row_slice, column_slice = index
    height, width = shape[-2:]
    rows, columns = range(height)[row_slice], range(width)[column_slice]
    first = expert[0] * height if expert else 0
    return range(first + rows.start, first + rows.stop, rows.step), columns, width


def _bands(low: int, high: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """A flat range as at most three rectangles (top, bottom, left, right) in rows of `width`, in order."""
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
    """How many of `numbers`, which are ascending, are below `limit`."""
    return len(range(numbers.start, min(numbers.stop, max(limit, numbers.start)), numbers.step))
