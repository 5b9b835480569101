"""Which runner a rank gets, and its model loaded for it: our kernel or FastGen on a GPU, the compiled decoder or torch on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.errors import ModelNotServable, PlatformError
from deployments.engine.progress import Progress
from deployments.engine.shard_spec import ShardSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deployments.engine.cuts import Cut
    from deployments.engine.fastgen import FastGen
    from deployments.engine.gpu.static import StaticDecode
    from deployments.engine.group import Group
    from deployments.engine.handover import Handover
    from deployments.engine.native.decoder import Decoder
    from deployments.engine.native.proof import Ranks
    from deployments.engine.runner import Runner
    from deployments.engine.sampler import Sampler

    AnyRunner = Runner | Decoder | StaticDecode | FastGen

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Runners:
    """Makes the runners of one rank, as often as it loads a model."""

    device: torch.device
    group: Group | None
    handover: Handover | None
    progress: Progress
    cuts: Mapping[str, Cut] | None = None  # of the model that was loaded last

    def load(self, spec: ShardSpec) -> tuple[AnyRunner, ShardSpec]:
        """Also the spec, with the blocks that fit. Raises ModelNotServable.

        On a GPU through our kernel or FastGen; else through the compiled decoder where that can be, else through torch."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(spec.threads)
        try:
            return self._load(spec)
        except BaseException:
            torch.set_num_threads(before)  # what ran before goes on
            raise

    def _load(self, spec: ShardSpec) -> tuple[AnyRunner, ShardSpec]:
        if self.device.type == "cuda" and spec.rendezvous.pp > 1:
            raise ModelNotServable("stages are computed by CPUs only so far; use pp=1, or engine.device=cpu", param="pp")
        if spec.settings.runner == "fastgen":
            return self._fastgen(spec)
        if self.device.type == "cuda":
            return self.on_gpu(spec)
        if spec.settings.runner == "torch":
            return _checked(self._loaded(spec)), spec
        return self._on_cpu(spec), spec

    def _fastgen(self, spec: ShardSpec) -> tuple[AnyRunner, ShardSpec]:
        from deployments.engine.fastgen import FastGen

        runner = FastGen.load(spec, self.device)
        return runner, runner.spec

    def on_gpu(self, spec: ShardSpec) -> tuple[AnyRunner, ShardSpec]:
        import torch

        from deployments.engine.gpu.build import gpu_runner

        torch.cuda.set_device(self.device)  # kernels are launched on the current one
        runner, num_blocks = gpu_runner(self._module(spec), spec, self.device, self.group)
        return runner, replace(spec, num_blocks=num_blocks)

    def _on_cpu(self, spec: ShardSpec) -> AnyRunner:
        from deployments.engine.native.build import NativeUnavailable
        from deployments.engine.native.proof import Disproved, decoder_of

        runner = self._loaded(spec)
        if spec.settings.native is False:
            return _checked(runner)
        try:
            decoder = decoder_of(
                runner,
                num_blocks=spec.num_blocks,
                max_positions=spec.model.max_model_len,
                threads=spec.threads,
                cache=spec.settings.cache,
                ranks=self._ranks(),
            )
            _leave_cores_to_decoder()
            return decoder
        except NativeUnavailable as error:
            if spec.settings.native:
                raise ModelNotServable(f"{spec.directory.name}: engine.native=true, but {error}") from error
            log.info("runs through torch", extra={"reason": str(error)})
            return _checked(self._loaded(spec) if isinstance(error, Disproved) else runner)

    def _ranks(self) -> Ranks:
        from deployments.engine.native.proof import Ranks

        group = self.group
        if not group:
            return Ranks()
        return Ranks(group.place.part, group.all_agree, (group.meeting or group.all_reduce) if group.place.tp > 1 else None)

    def _loaded(self, spec: ShardSpec) -> Runner:
        """The model in transformers' own code, cut to this rank's part."""
        from deployments.engine.attention import KvCache
        from deployments.engine.runner import Runner

        all_reduce = self.group.all_reduce if self.group and self.group.place.tp > 1 else None
        return Runner(self._module(spec), KvCache(spec.num_blocks, spec.settings.block_size), self.handover, all_reduce)

    def _module(self, spec: ShardSpec) -> nn.Module:
        """With weights that are numbers, all of them."""
        from deployments.engine import finite
        from deployments.engine.load import cuts_of, load

        model = load(
            spec.directory, spec.model.dtype, self.group, spec.settings, self.progress, spec.model.quantization, self.device
        )
        self.everywhere(lambda: finite.require(model, spec.directory.name), spec.directory.name)
        self.cuts = cuts_of(model)
        return model

    def everywhere(self, check: Callable[[], None], name: str) -> None:
        """Raises PlatformError on every rank when `check` does on any."""
        failure: PlatformError | None = None
        try:
            check()
        except PlatformError as error:
            failure = error
        if self.group and not self.group.all_agree(failure is None) and failure is None:
            failure = ModelNotServable(f"{name}: another rank refuses it")
        if failure:
            raise failure


def sampler(spec: ShardSpec) -> Sampler | None:
    """The compiled way from logits to tokens, where it can be had."""
    from deployments.engine.native.build import NativeUnavailable
    from deployments.engine.native.sampling import NativeSampler

    if spec.settings.native is False:
        return None
    try:
        return NativeSampler(spec.settings.cache, spec.threads)
    except NativeUnavailable as error:
        log.info("samples through torch", extra={"reason": str(error)})
        return None


def _leave_cores_to_decoder() -> None:
    """What torch still does between steps (gathering rows, penalties, log probabilities) is too small for threads; its own would
    spin for milliseconds after each, on the cores where the decoder's threads then wait for one another."""
    import torch

    torch.set_num_threads(1)


def _checked(runner: Runner) -> Runner:
    """With paging proven."""
    runner.check()
    return runner
