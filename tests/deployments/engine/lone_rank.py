"""One rank of a group whose others aren't there: torch's fake backend lets collectives pass, which is enough to cut and to load.

Run as a program it answers in JSON: `python -m tests.deployments.engine.lone_rank RANK SIZE WHAT ...`, where SIZE is the number of
tensor parts, or `2x3` for two parts of each of three stages.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from cluster.settings import EngineSettings
from deployments.engine.progress import Progress
from deployments.engine.rendezvous import Rendezvous


def join(rank: int, size: int, pp: int = 1) -> Any:
    """A `Group` that believes in its other ranks; None for a size of 1."""
    if size == 1:
        return None
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_SIZE": str(size)}
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    import deepspeed
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from deployments.engine.group import Group
    from deployments.engine.wire import Gloo, Wires, stage_group

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed("fake", auto_mpi_discovery=False, verbose=False)
    rendezvous = Rendezvous("file:///nowhere", rank, size, 60, pp)
    among = Gloo(stage_group(rendezvous.place))
    Group.wires = Wires(among, among)
    return Group(rendezvous, native=None)


def compare(dtype: str, directories: list[Path], group: Any) -> dict[str, Any]:
    """For each model: where its load came from, and what differs from a whole model that DeepSpeed cut, bit by bit.

    Types are those of transformers' whole model: DeepSpeed has one for all, and so rounds what transformers keeps wide.
    """
    import torch

    from deployments.engine.load import load
    from deployments.engine.runner import DTYPES, load_model

    found = {}
    for directory in directories:
        progress = Progress()
        ours = load(directory, dtype, group, EngineSettings(cut_weights_bytes=0), progress)
        theirs = load_model(directory, dtype)
        types = {name: tensor.dtype for name, tensor in tensors(theirs).items()}
        theirs = group.shard(theirs, DTYPES[dtype]) if group else theirs
        differs = [name for name, tensor in tensors(ours).items() if tensor.is_meta]
        differs += sorted(tensors(ours).keys() ^ tensors(theirs).keys())
        for name, tensor in tensors(theirs).items():
            mine = tensors(ours).get(name)
            if mine is None or mine.dtype != types[name] or not torch.equal(mine.to(tensor.dtype), tensor):
                differs.append(name)
        bytes_held = sum(tensor.nbytes for tensor in ours.parameters())
        found[directory.name] = {"source": progress.now().source, "differs": differs, "bytes": bytes_held}
    return found


def hold(directories: list[Path], group: Any) -> dict[str, Any]:
    """For each model: the numbers in this rank's weights, and where they came from."""
    from deployments.engine.load import load

    found = {}
    for directory in directories:
        progress = Progress()
        model = load(directory, "float32", group, EngineSettings(cut_weights_bytes=0), progress)
        found[directory.name] = {"held": sum(tensor.numel() for tensor in model.parameters()), "source": progress.now().source}
    return found


def tensors(model: Any) -> dict[str, Any]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def measure(small: Path, directory: Path, cache: Path, group: Any) -> dict[str, Any]:
    """The load of one model: how far memory rose above what it was before, what was read, and what is held."""
    from deployments.engine.load import load

    settings = EngineSettings(cache=cache)
    load(small, "float32", group, settings, Progress())  # code that is imported meanwhile is not the load's memory
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, progress = memory("VmRSS"), Progress()
    model = load(directory, "float32", group, settings, progress)
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    now = progress.now()
    return {"rose": memory("VmHWM") - before, "held": held, "read": now.bytes_read, "of": now.bytes_total, "source": now.source}


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    rank, size, what, *rest = sys.argv[1:]
    answer, sys.stdout = sys.stdout, sys.stderr  # DeepSpeed prints
    tp, _, pp = size.partition("x")
    group = join(int(rank), int(tp) * int(pp or 1), int(pp or 1))
    if what == "hold":
        found = hold([*map(Path, rest)], group)
    else:
        found = measure(*map(Path, rest), group) if what == "measure" else compare(rest[0], [*map(Path, rest[1:])], group)
    json.dump(found, answer)
