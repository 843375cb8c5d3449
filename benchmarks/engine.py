"""The PyTorch engine on one device: against memory bandwidth, the matrix rate, and `transformers`' generate.

    python -m benchmarks.engine                                        # gpt2_124m, two CPU cores, a few minutes
    python -m benchmarks.engine kraken_125m_4way --rounds 5
    python -m benchmarks.engine quickstart --prompt-tokens 32 --new-tokens 8 --rounds 1     # does it run?

Random weights of the preset's shape. `transformers` runs a GPT-2 of the same layers, width, heads, context and
vocabulary, with the same batch, type, threads and prompts' lengths; without that package its ratios are null. Both
decode greedily, so that neither samples; a decode time is that of all new tokens less that of one. Rounds alternate.

The last line is JSON:

    decode_bandwidth_fraction   batch 1: bytes of weights that a token reads, over the time of a token, over bandwidth
    throughput_ratio_vs_transformers_8, _16     tokens/s of that many requests over generate's with that batch
    prefill_matmul_fraction     one prompt of a whole context: floating-point operations (causal attention counted
                                half; the head, and what only the last token needs of the last layer, once) over the
                                time to the first token, over the matrix rate
    scheduler_share_16          16 requests, half greedy and half with temperature 0.8 and top-k 50: the share of decode
                                time outside the forward pass: planning, drawing, handing out
    scheduler_share_16_drawn, _top_p    the same where all are drawn at temperature 1, as requests are that ask for
                                nothing else, or with top-p 0.9: random weights make that the hardest case, since
                                their distributions are flat

Bandwidth and matrix rate are measured in the same rounds: the best of a sum and two matrix-vector products over 400 MB,
and of two products of size 2048 (8192 on CUDA).
"""

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kraken.config import EngineConfig, ModelConfig
from kraken.engine.batch import ForwardOutput, StepBatch
from kraken.engine.engine import TorchEngine
from kraken.engine.kernels.choose import choose_kernels
from kraken.engine.protocol import EngineInfo, Request, SamplingParams
from kraken.evaluate import collect
from kraken.model import Kraken
from kraken.plan import cost as plan
from kraken.presets import PRESETS

GREEDY: dict[str, Any] = {"temperature": 0.0}
TOP_K: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "seed": 1}
DRAWN: dict[str, Any] = {"seed": 1}
TOP_P: dict[str, Any] = {"top_p": 0.9, "seed": 1}
BATCHES = (8, 16)


class Ours:
    """The engine, and the time that its forward passes take."""

    def __init__(self, model: Kraken, config: EngineConfig):
        shape = model.config
        info = EngineInfo(
            name="torch",
            context_length=shape.context_length,
            num_ids=shape.vocab_size,
            eot_id=0,
            tokenizer_fingerprint="none",
        )
        self.forward_s = 0.0
        self._kernels = choose_kernels(model.wte.weight.device, model.wte.weight.dtype)
        self._vocab_size = shape.vocab_size
        self._engine = TorchEngine.from_model(model, info, config)
        self._forward = self._engine._runner.forward
        self._engine._runner.forward = self._timed_forward  # type: ignore[method-assign]
        self._loop = asyncio.Runner()
        self._num_requests = 0

    def seconds(self, batch: int, prompt_tokens: int, new_tokens: int, kinds: tuple[dict[str, Any], ...]) -> float:
        """The time of `batch` requests that come together, drawn by `kinds` in turn."""
        requests = [
            self._request(prompt_tokens, SamplingParams(max_tokens=new_tokens, **kinds[i % len(kinds)]))
            for i in range(batch)
        ]

        async def all_of_them() -> None:
            await asyncio.gather(*(collect(self._engine, request) for request in requests))

        self._kernels.release_threads()  # of what was measured before, as a process that serves has none
        self.forward_s = 0.0
        started_at = time.perf_counter()
        self._loop.run(all_of_them())
        return time.perf_counter() - started_at

    def decode(self, batch: int, prompt_tokens: int, new_tokens: int, *kinds: dict[str, Any]) -> tuple[float, float]:
        """Seconds of decoding, and of the forward passes among them."""
        first, first_forward = self.seconds(batch, prompt_tokens, 1, kinds), self.forward_s
        whole = self.seconds(batch, prompt_tokens, new_tokens, kinds)
        return whole - first, self.forward_s - first_forward

    def close(self) -> None:
        self._loop.run(self._engine.close())
        self._loop.close()

    def _request(self, prompt_tokens: int, sampling: SamplingParams) -> Request:
        self._num_requests += 1
        prompt = torch.randint(self._vocab_size, (prompt_tokens,)).tolist()
        return Request(id=str(self._num_requests), prompt_ids=tuple(prompt), sampling=sampling)

    def _timed_forward(self, batch: StepBatch) -> ForwardOutput:
        started_at = time.perf_counter()
        output = self._forward(batch)
        wait(output.logits_RV.device)
        self.forward_s += time.perf_counter() - started_at
        return output


class Transformers:
    """GPT-2 of `transformers`, as its documentation has one generate."""

    def __init__(self, shape: ModelConfig, dtype: torch.dtype, device: torch.device):
        import transformers

        config = transformers.GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.context_length,
            n_embd=shape.width,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.version = transformers.__version__
        self._model = transformers.GPT2LMHeadModel(config).eval()
        self._model.to(device=device, dtype=dtype)
        self._vocab_size, self._device = shape.vocab_size, device

    @torch.inference_mode()
    def seconds(self, batch: int, prompt_tokens: int, new_tokens: int) -> float:
        ids_BT = torch.randint(1, self._vocab_size, (batch, prompt_tokens), device=self._device)
        started_at = time.perf_counter()
        self._model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
        )
        wait(self._device)
        return time.perf_counter() - started_at

    def decode(self, batch: int, prompt_tokens: int, new_tokens: int) -> float:
        return -self.seconds(batch, prompt_tokens, 1) + self.seconds(batch, prompt_tokens, new_tokens)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        wait(device)
        started_at = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - started_at)
    return min(times)


def bandwidth(dtype: torch.dtype, device: torch.device) -> float:
    """Bytes per second at which memory delivers what is read once."""
    width = 4096
    matrix = torch.ones(400_000_000 // (width * dtype.itemsize), width, device=device).to(dtype)
    column, row = torch.ones(width, device=device).to(dtype), torch.ones(len(matrix), device=device).to(dtype)
    works = (matrix.sum, lambda: torch.mv(matrix, column), lambda: torch.mv(matrix.t(), row))
    return matrix.nbytes / min(best_seconds(work, device, 5) for work in works)


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a large product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(best_seconds(work, device, 4) for work in (lambda: a @ b, lambda: F.linear(a, b)))


def decode_bytes_per_token(model: Kraken) -> int:
    """Weights that one token reads at batch 1; its keys and values are small beside them and not counted."""
    return plan.matrix_weights(model.config) * model.wte.weight.element_size()


def prefill_flops(model: Kraken, num_tokens: int) -> int:
    c = model.config
    attention = 2 * c.num_layers * c.num_ways * c.width * num_tokens**2
    of_prompt = plan.prompt_weights(c)
    return 2 * of_prompt * num_tokens + attention + 2 * (plan.matrix_weights(c) - of_prompt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="gpt2_124m", choices=sorted(PRESETS), metavar="PRESET")
    parser.add_argument(
        "--prompt-tokens", type=int, default=128, metavar="N", help="of each request that decodes (128)"
    )
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="of each request (64)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="alternations, of which medians (3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="(every core)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.new_tokens < 2:
        parser.error("--new-tokens must be 2 or more, since the first belongs to the prompt")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shape = PRESETS[args.preset]().model
    if args.prompt_tokens + args.new_tokens > shape.context_length:
        parser.error(f"--prompt-tokens and --new-tokens exceed the context of {args.preset}, {shape.context_length}")
    model = Kraken(shape)
    model.init_weights(seed=1)
    model = model.requires_grad_(False).to(device, dtype)
    config = EngineConfig(num_threads=args.threads, prefix_reuse=False)
    ours = Ours(model, config)
    theirs = None
    if importlib.util.find_spec("transformers") is None:
        print(
            "transformers is not installed: no comparison; `pip install transformers` beside this package", flush=True
        )
    else:
        theirs = Transformers(shape, dtype, device)
    rounds: dict[str, list[float]] = {}

    def note(**values: float) -> None:
        for name, value in values.items():
            rounds.setdefault(name, []).append(value)
            print(f"{name:32} {value:12.4g}", flush=True)

    for batch in (1, *BATCHES):
        ours.seconds(batch, args.prompt_tokens, 2, (GREEDY,))
    for _ in range(args.rounds):
        bytes_per_s, flops_per_s = bandwidth(dtype, device), matrix_rate(dtype, device)
        num_later = args.new_tokens - 1
        seconds, _ = ours.decode(1, args.prompt_tokens, args.new_tokens, GREEDY)
        tokens_per_s = num_later / seconds
        note(
            bandwidth_gb_per_s=bytes_per_s / 1e9,
            matrix_tflop_per_s=flops_per_s / 1e12,
            tokens_per_s_1=tokens_per_s,
            decode_bandwidth_fraction=decode_bytes_per_token(model) * tokens_per_s / bytes_per_s,
        )
        for batch in BATCHES:
            seconds, _ = ours.decode(batch, args.prompt_tokens, args.new_tokens, GREEDY)
            note(**{f"tokens_per_s_{batch}": batch * num_later / seconds})
            if theirs is not None:
                other = theirs.decode(batch, args.prompt_tokens, args.new_tokens)
                note(**{f"transformers_tokens_per_s_{batch}": batch * num_later / other})
                note(**{f"throughput_ratio_vs_transformers_{batch}": other / seconds})
        prompt_tokens = shape.context_length - 1
        ttft_s = ours.seconds(1, prompt_tokens, 1, (GREEDY,))
        note(ttft_ms=ttft_s * 1e3)
        note(prefill_matmul_fraction=prefill_flops(model, prompt_tokens) / ttft_s / flops_per_s)
        kinds_of: dict[str, list[dict[str, Any]]] = {"": [GREEDY, TOP_K], "_drawn": [DRAWN], "_top_p": [TOP_P]}
        for suffix, kinds in kinds_of.items():
            seconds, forward_s = ours.decode(16, args.prompt_tokens, args.new_tokens, *kinds)
            note(**{f"scheduler_share_16{suffix}": 1.0 - forward_s / seconds})
    ours.close()
    medians = {name: round(statistics.median(values), 4) for name, values in rounds.items()}
    ratios = {f"throughput_ratio_vs_transformers_{batch}": None for batch in BATCHES}
    result = {
        "preset": args.preset,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{args.threads} CPU threads",
        "dtype": args.dtype,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "transformers": None if theirs is None else theirs.version,
        **ratios,
        **medians,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
