"""Run by the Python of vLLM's own environment: the log probabilities that its engine gives for the tokens of a prompt.

python vllm_logits.py FOLDER IDS.json OUT.json
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "HF_HUB_OFFLINE": "1",
}

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    folder, ids_file, out = sys.argv[1:]
    with open(ids_file) as file:
        prompts = json.load(file)
    with open(f"{folder}/config.json") as file:
        vocabulary = json.load(file)["vocab_size"]
    engine = LLM(
        model=folder, skip_tokenizer_init=True, enforce_eager=True, max_model_len=256, max_num_seqs=4,
        max_logprobs=-1, seed=0, enable_prefix_caching=False,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=vocabulary, detokenize=False)
    results = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    found = [
        [[position[token].logprob for token in range(vocabulary)] for position in result.prompt_logprobs[1:]]
        for result in results
    ]
    with open(out, "w") as file:
        json.dump(found, file)
