"""vLLM without Baton, in a process of its own: `python -m tests.with_vllm.alone MODEL < prompts.json > answers.json`.

Reads `{"prompts": [[token ids], ...], "max_tokens": n}` and answers each prompt alone, first with an empty prefix cache, then with the one
that this left: the two differ by where chunks begin. Writes for each run the tokens of each prompt, and how far apart the two best
log probabilities were at each of them.
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def main() -> None:
    from vllm import LLM, SamplingParams

    told = json.load(sys.stdin)
    llm = LLM(
        model=sys.argv[1], dtype="float32", enforce_eager=True, block_size=32, kv_cache_memory_bytes=2**28, max_num_seqs=32,
        max_num_batched_tokens=512, skip_tokenizer_init=True, generation_config="vllm", seed=0,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=told["max_tokens"], ignore_eos=True, detokenize=False, logprobs=2)
    answers: dict[str, list[object]] = {"cold": [], "warm": []}
    for run, found in answers.items():
        for prompt in told["prompts"]:
            if run == "cold":
                llm.reset_prefix_cache()
            [output] = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
            answer = output.outputs[0]
            margins = [
                abs(max(top) - sorted(top)[-2])
                for top in ([p.logprob for p in step.values()] for step in answer.logprobs)
            ]
            found.append({"tokens": list(answer.token_ids), "margins": margins})
        if run == "cold":  # warm: every prompt finds its own blocks
            for prompt in told["prompts"]:
                llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    json.dump(answers, sys.__stdout__)


if __name__ == "__main__":
    sys.stdout = sys.stderr  # what libraries print is no answer
    main()
