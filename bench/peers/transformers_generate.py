"""`transformers.generate` over static batches: the next batch starts when the last answer of this one is complete."""

from __future__ import annotations

import time

from protocol import Generate, Request, arguments, serve


def load() -> Generate:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria

    options = arguments()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    class Clock(StoppingCriteria):
        """Stops nothing; notes when the tokens came."""

        def __init__(self):
            self.started, self.times = time.perf_counter(), []

        def __call__(self, input_ids, scores, **kwargs):
            self.times.append(time.perf_counter() - self.started)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def batch(prompts: list[list[int]], max_tokens: int) -> list[Request]:
        ids, clock = torch.tensor(prompts), Clock()
        config = GenerationConfig(max_new_tokens=max_tokens, min_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, stopping_criteria=[clock])
        finished_s, num_tokens = time.perf_counter() - clock.started, output.shape[1] - ids.shape[1]
        request = {
            "num_tokens": num_tokens,
            "first_token_s": clock.times[0],
            "finished_s": finished_s,
            "token_times_s": clock.times,
        }
        return [request for _ in prompts]

    def generate(prompts: list[list[int]], max_tokens: int, concurrency: int) -> list[Request]:
        batches = [prompts[at : at + concurrency] for at in range(0, len(prompts), concurrency)]
        return [request for some in batches for request in batch(some, max_tokens)]

    return generate


if __name__ == "__main__":
    serve(load, ["transformers", "torch"])
