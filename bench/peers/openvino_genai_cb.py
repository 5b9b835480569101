"""OpenVINO GenAI's continuous batching. The model is exported to its format first, once, beside the directory given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from protocol import ClosedLoop, Generate, Request, arguments, serve


def exported(model: Path, quantization: str | None) -> Path:
    """The directory in OpenVINO's format; weights in 16 bits, or in 8 as its own tool quantises them by default."""
    target = model.with_name(model.name + ("-openvino-int8" if quantization else "-openvino"))
    if not (target / "openvino_model.bin").is_file():
        tool = Path(sys.executable).with_name("optimum-cli")
        command = [
            tool,
            "export",
            "openvino",
            "--model",
            model,
            "--task",
            "text-generation-with-past",
            "--weight-format",
            quantization or "fp16",
            target,
        ]
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
    return target


def load() -> Generate:
    import numpy
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.dynamic_split_fuse = True
    scheduler.max_num_batched_tokens = 1024
    scheduler.max_num_seqs = options.max_concurrency
    scheduler.enable_prefix_caching = options.prefix_cache
    properties = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16", "INFERENCE_NUM_THREADS": options.threads}
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(directory), scheduler, "CPU", properties)

    def generate(prompts: list[list[int]], max_tokens: int, concurrency: int) -> list[Request]:
        loop = ClosedLoop(len(prompts), concurrency)
        config = openvino_genai.GenerationConfig(
            max_new_tokens=max_tokens, min_new_tokens=max_tokens, ignore_eos=True, do_sample=False
        )
        handles, counts = {}, dict.fromkeys(range(len(prompts)), 0)
        while loop.unfinished:
            for request in loop.admit():
                ids = openvino.Tensor(numpy.array([prompts[request]], dtype=numpy.int64))
                handles[request] = pipeline.add_request(request, ids, config)
            pipeline.step()
            for request, handle in list(handles.items()):
                while handle.can_read():
                    counts[request] += sum(len(output.generated_ids) for output in handle.read().values())
                finished = handle.get_status() != openvino_genai.GenerationStatus.RUNNING
                loop.note(request, counts[request], finished)
                if finished:
                    del handles[request]
        return loop.results()

    return generate


if __name__ == "__main__":
    options = arguments()
    directory = exported(Path(options.model), options.quantization)
    serve(load, ["openvino-genai", "openvino", "optimum-intel"])
