"""Our own engine under the same protocol, without Serve and HTTP around it."""

from __future__ import annotations

from protocol import Generate, Request, arguments, serve


def load() -> Generate:
    from cluster.settings import EngineSettings
    from cluster.types import Sampling
    from deployments.engine.local import LocalEngine

    options = arguments()
    settings = EngineSettings(
        threads=max(1, options.threads // options.tp),
        max_sequences=options.max_concurrency,
        kv_cache_bytes=2 << 30,
        prefix_cache=options.prefix_cache,
        speculation=0,  # a model of random weights runs into loops, which guessing would make too easy
    )
    engine = LocalEngine(options.model, tp=options.tp, dtype="bfloat16", settings=settings, quantization=options.quantization)

    def generate(prompts: list[list[int]], max_tokens: int, concurrency: int) -> list[Request]:
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        results = engine.generate(prompts, sampling, concurrency=concurrency)
        return [
            {
                "num_tokens": len(result.token_ids),
                "first_token_s": result.first_token_s,
                "finished_s": result.finished_s,
                "token_times_s": result.token_times_s,
                "cached_tokens": result.cached_tokens,
            }
            for result in results
        ]

    return generate


if __name__ == "__main__":
    serve(load, ["torch", "deepspeed", "transformers", "ray"])
