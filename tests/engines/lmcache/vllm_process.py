"""A vLLM engine with LMCache's connector, in a process of its own: a question is a JSON line, so is its answer.

Started by the vLLM environment's interpreter: vllm_process.py MODEL PORT.
"""

from __future__ import annotations

import json
import os
import sys

TOKENS = 16


def engine(model: str, port: int):
    from vllm import LLM

    return LLM(
        model=model,
        skip_tokenizer_init=True,
        max_model_len=2048,
        enforce_eager=True,
        enable_prefix_caching=False,  # what is found was found outside
        disable_hybrid_kv_cache_manager=True,
        disable_log_stats=False,
        distributed_executor_backend="uni",
        kv_transfer_config={
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": port},
        },
    )


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine prints
    from vllm import SamplingParams

    asked = engine(sys.argv[1], int(sys.argv[2]))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        prompt = json.loads(line)
        greedy = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
        (found,) = asked.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
        answer = {"tokens": list(found.outputs[0].token_ids), "cached": found.num_cached_tokens}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
