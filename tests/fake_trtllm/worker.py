"""Forks the ranks of models: a line of options on stdin starts one, whose rank 0 connects to the socket named there,
reads commands and answers with logits, all as JSON lines.

Started by `tests/trtllm_ranks.py`, which documents the commands.
"""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensorrt_llm._torch.attention_backend import AttentionMetadata, KVCacheManager
from tensorrt_llm._torch.distributed import AllReduce
from tensorrt_llm._torch.model_loader import load_config, load_model
from tensorrt_llm._torch.models.extra_attrs import model_extra_attrs
from tensorrt_llm._torch.models.modeling_utils import MetaInitMode
from tensorrt_llm.mapping import Mapping

import kraken.trtllm.modeling  # noqa: F401  registers the model


class Rank:
    """One process with its part of the model and of the cache."""

    def __init__(self, options: dict[str, Any], rank: int):
        num_ranks = options["num_ranks"]
        self.device = torch.device("cuda", rank) if options["device"] == "cuda" else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            init_method=f"file://{options['rendezvous']}",
            rank=rank,
            world_size=num_ranks,
        )
        mapping = Mapping(world_size=num_ranks, rank=rank, tp_size=num_ranks)
        folder = Path(options["folder"])
        config = load_config(folder, mapping, options["strategy"], **options["model_kwargs"])
        self.model = load_model(folder, config, self.device)
        shape = config.pretrained_config
        self.cache = KVCacheManager(shape.num_key_value_heads // num_ranks, shape.head_dim)

    @torch.inference_mode()
    def step(self, requests: list[tuple[int, list[int]]], all_logits: bool) -> dict[int, list[list[float]]]:
        """New tokens of each request -> its logits [T or 1, V]."""
        requests = sorted(requests, key=lambda request: self.cache.num_cached(request[0]) > 0)
        cached = [self.cache.num_cached(request_id) for request_id, _ in requests]
        metadata = AttentionMetadata(
            seq_lens=[len(ids) for _, ids in requests],
            request_ids=[request_id for request_id, _ in requests],
            num_contexts=cached.count(0),
            kv_cache_manager=self.cache,
        )
        positions = [start + i for start, (_, ids) in zip(cached, requests, strict=True) for i in range(len(ids))]
        with model_extra_attrs(self.model.extra_attrs):
            logits = self.model(
                attn_metadata=metadata,
                input_ids=torch.tensor([token for _, ids in requests for token in ids], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                return_context_logits=all_logits,
            )
        parts = logits.split(metadata.seq_lens if all_logits else 1)
        return {request_id: part.tolist() for request_id, part in zip(metadata.request_ids, parts, strict=True)}

    def answer(self, command: dict[str, Any]) -> Any:
        if "requests" in command:
            return self.step([(i, ids) for i, ids in command["requests"]], command["all_logits"])
        if "free" in command:
            return self.cache.free_resources(command["free"])
        log = [(shape, str(dtype).removeprefix("torch."), strategy.name) for shape, dtype, strategy in AllReduce.log]
        AllReduce.log.clear()
        return {"all_reduces": log, "meta_init": self.model.meta_init}

    def serve(self, lines: Any, answers: Any) -> None:
        """Rank 0 reads the commands and answers; all ranks carry them out."""
        while True:
            box = [lines.readline() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(box, device=torch.device("cpu"))
            if not box[0]:
                return
            answer = self.answer(json.loads(box[0]))
            if dist.get_rank() == 0:
                print(json.dumps(answer), file=answers, flush=True)


def run_ranks(options: dict[str, Any]) -> int:
    """In a child of the server: become rank 0, fork the others, serve until the socket closes; gives the status."""
    errors = os.open(options["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    os.environ |= options["environment"]
    rank, children = 0, []
    for number in range(1, options["num_ranks"]):
        child = os.fork()
        if child == 0:
            rank = number
            break
        children.append(child)
    try:
        if rank > 0:
            Rank(options, rank).serve(None, None)
        else:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(options["socket"])
                answers = connection.makefile("w")
                worker = Rank(options, rank)
                print(json.dumps({"max_seq_len": worker.model.infer_max_seq_len()}), file=answers, flush=True)
                worker.serve(connection.makefile("r"), answers)
                for child in children:
                    os.waitpid(child, 0)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def main() -> None:
    """One import of torch for all models: six processes that import it take half a minute."""
    torch.set_num_threads(1)
    with MetaInitMode():
        torch.empty(0)  # the first time, this imports most of torch's compiler
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(run_ranks(json.loads(line)))


if __name__ == "__main__":
    main()
