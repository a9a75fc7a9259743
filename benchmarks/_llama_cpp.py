"""llama.cpp on one GGUF through `llama-cpp-python`: `_llama_cpp.py FILE PROMPT DECODE REPEATS THREADS [cpu]`.

With `cpu` its times are processor time: of one thread, on a machine that others use too.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import llama_cpp as llama


def main() -> None:
    path = sys.argv[1]
    prompt, decode, repeats, threads = map(int, sys.argv[2:6])
    clock = time.process_time if sys.argv[6:] == ["cpu"] else time.perf_counter
    llama.llama_backend_init()

    @llama.llama_log_callback
    def quiet(*_: object) -> None:
        """Its log is for its developers."""

    llama.llama_log_set(quiet, None)
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp does not load {path}")
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    prefills, steps = [], []
    for repeat in range(repeats + 1):
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = prompt + decode + 16, max(512, prompt), 512
        settings.n_threads = settings.n_threads_batch = threads
        context = llama.llama_init_from_model(model, settings)
        tokens = (llama.llama_token * prompt)(*[(i * 7919 + 13) % vocabulary for i in range(prompt)])
        start = clock()
        llama.llama_decode(context, llama.llama_batch_get_one(tokens, prompt))
        llama.llama_get_logits(context)
        taken = clock() - start
        durations = []
        for i in range(decode):
            token = (llama.llama_token * 1)(17 + i)
            start = clock()
            llama.llama_decode(context, llama.llama_batch_get_one(token, 1))
            llama.llama_get_logits(context)
            durations.append(clock() - start)
        llama.llama_free(context)
        if repeat:  # the first one warms up
            prefills.append(taken)
            steps += durations
    sys.stdout.write(json.dumps({
        "prefill_tokens_per_second": prompt / statistics.median(prefills),
        "decode_tokens_per_second": 1 / statistics.median(steps),
        "system": llama.llama_print_system_info().decode(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
