"""Sentences a second of the causal writer: batched with all that is on, against one prompt at a time.

    python bench/writers.py --model data/photo/llm --gguf_file gemma3-270m.gguf --captions CAPTIONS.json

The reference is the same model, in the same precision, given one whole prompt after another, as a plain script
would. Both write about the same pairs, in turn, and their sentences are compared.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from math import nan
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from record import Figure, exit_if_missed, record

from pc_clip.core.config.write import LanguageModelConfig
from pc_clip.core.errors import run_script
from pc_clip.data.captions import read_captions
from pc_clip.data.differences import choose_pairs
from pc_clip.write.causal import LanguageModelWriter
from pc_clip.write.writers import Job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/photo/llm")
    parser.add_argument("--gguf_file")
    parser.add_argument("--captions", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = {name: getattr(arguments, name) for name in ("model", "gguf_file", "dtype", "max_new_tokens")}
    writer = LanguageModelWriter(LanguageModelConfig(batch_size=arguments.batch_size, **options))
    single = LanguageModelConfig(batch_size=1, share_prefix=False, **options)
    batched = writer.config
    captions = read_captions(arguments.captions)
    pairs = choose_pairs(sorted(captions), 64 * arguments.rounds, 0, False)
    jobs = [Job(captions[i][1][0], captions[j][1][0], n) for n, (i, j) in enumerate(pairs)]
    writer.write(jobs[:2])  # warm
    seconds, written, same, compared = {"one": 0.0, "many": 0.0}, {"one": 0, "many": 0}, 0, 0
    for turn in range(arguments.rounds):  # in turn, so that both meet the same load of the machine
        of_turn = jobs[64 * turn : 64 * (turn + 1)]
        texts = {}
        for name, config, given in (("one", single, of_turn[:6]), ("many", batched, of_turn)):
            writer.config, then = config, time.perf_counter()
            texts[name] = writer.write(given)
            seconds[name] += time.perf_counter() - then
            written[name] += len(given)
        same += sum(a == b for a, b in zip(texts["one"], texts["many"]))
        compared += len(texts["one"])
    rate = {name: written[name] / seconds[name] for name in seconds}
    about = (
        f"{Path(arguments.model).name} {arguments.dtype}, batch {arguments.batch_size}, {arguments.threads} thread(s)"
    )
    missed = record([
        Figure("causal writer, batched : one by one", rate["many"] / rate["one"], 4.0, "x",
               f"{about}; {rate['many']:.2f} against {rate['one']:.2f} sentences/s; {same} of {compared} the same"),
        Figure("causal writer, peak memory", _peak() / 2**20, nan, "GiB", about),
    ])  # fmt: skip
    exit_if_missed(missed)


def _peak() -> float:
    """The largest resident size of this process so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    run_script(main)
