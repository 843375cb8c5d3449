"""All-reduce over peer memory: no buffer is written while it is read, and forward passes equal those of one device.

Ranks are threads here, and wait on a CPU; `tests/test_peer_kernels.py` has the kernels, `tests/test_engine_gpus.py`
GPUs.
"""

import json
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_engine_devices import DIVISIBLE, make_model
from torch import Tensor
from torch.distributed import HashStore

from kraken.config import ConfigError, EngineConfig
from kraken.engine.batch import StepBatch
from kraken.engine.distributed import choose_backend as choose_backend
from kraken.engine.distributed.all_reduce import LocalAllReduce
from kraken.engine.distributed.device_group import DeviceGroup
from kraken.engine.distributed.partition import Part, weights_of
from kraken.engine.distributed.peer_all_reduce import (
    RELEASED,
    Backend,
    P2pStore,
    PeerChannel,
    num_buffer_bytes,
    num_memory_bytes,
)
from kraken.engine.distributed.peer_memory import PeerMemory
from kraken.engine.distributed.worker_group import WorkerError
from kraken.engine.kernels.choose import choose_kernels
from kraken.engine.kernels.norm import Norm
from kraken.engine.kernels.torch.kernels import TorchKernels
from kraken.engine.model.network import Network
from kraken.engine.model_runner import ModelRunner
from kraken.model import Kraken

NUM_IDS = 120
CPU = torch.device("cpu")


class PlainKernels:
    """`PeerKernels` in plain operations on memory that threads share."""

    def __init__(self, rank: int, flags_P: Tensor, peer_flags: tuple[Tensor, ...]):
        self.rank, self.flags_P, self.peer_flags, self.message = rank, flags_P, peer_flags, 0

    def publish(self, x_RC: Tensor, buffer: Tensor, buffer_index: int, waits: bool) -> None:
        self._begin(buffer_index, waits)
        buffer[: x_RC.numel()] = x_RC.flatten()
        self.signal(buffer_index)

    def add_norm(
        self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None, targets: tuple[Tensor, ...],
        out_buffer: Tensor | None, buffer_index: int, waits: bool, sends_signal: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        out_WTD = x_WTD + addend_WTD
        self._begin(buffer_index, waits)
        for target in targets:
            target[: out_WTD[0].numel()] = out_WTD.sum(0).flatten()
        if out_buffer is not None:
            out_buffer[: out_WTD.numel()] = out_WTD.flatten()
            out_WTD = out_buffer[: out_WTD.numel()].view(out_WTD.shape)
        if sends_signal:
            self.signal(buffer_index)
        return out_WTD, None if norm is None else norm(out_WTD)

    def signal(self, buffer_index: int) -> None:
        assert self.message % 2 != buffer_index, "the first message's buffer is 0"
        for flag in self.peer_flags:
            flag.fill_(self.message)

    def skip(self, buffer_index: int) -> None:
        self.message += 1
        self.signal(buffer_index)

    def wait(self, buffer_index: int) -> None:
        assert self.message % 2 != buffer_index
        self._await(self.message)

    def reduce_add_norm(
        self, x_TD: Tensor | None, parts: tuple[Tensor, ...], out_TD: Tensor, norm: Norm | None, buffer_index: int
    ) -> Tensor | None:
        self.wait(buffer_index)
        total_TD = sum(part[: out_TD.numel()].view(out_TD.shape) for part in parts)
        out_TD.copy_(total_TD if x_TD is None else x_TD + total_TD)
        return None if norm is None else norm(out_TD[None])

    def add_reduced_norm(
        self, x_WTD: Tensor, addend_WTD: Tensor, parts: tuple[Tensor, ...], norm: Norm, buffer_index: int | None
    ) -> tuple[Tensor, Tensor]:
        if buffer_index is not None:
            self.wait(buffer_index)
        others = sum(part.flatten()[: x_WTD[0].numel()].view(x_WTD[0].shape) for part in parts)
        return x_WTD + addend_WTD, norm(addend_WTD + x_WTD.sum(0) + others)

    def _begin(self, buffer_index: int, waits: bool) -> None:
        if waits:
            self._await(self.message)
        elif any(int(flag) < self.message for peer, flag in enumerate(self.flags_P) if peer != self.rank):
            raise AssertionError("the others may still read what is overwritten")
        self.message += 1
        assert self.message % 2 != buffer_index

    def _await(self, message: int) -> None:
        ends_at = time.monotonic() + 30
        while any(int(flag) < message for peer, flag in enumerate(self.flags_P) if peer != self.rank):
            assert time.monotonic() < ends_at, "a rank does not come"
            time.sleep(0)


def make_channels(num_ranks: int, buffer_bytes: int) -> list[PeerChannel]:
    """The channels of ranks in one process."""
    num_bytes = num_memory_bytes(num_ranks, buffer_bytes)
    memory = PeerMemory([torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(num_ranks)])
    make_kernels: Any = PlainKernels
    return [PeerChannel(memory, rank, buffer_bytes, torch.float32, make_kernels) for rank in range(num_ranks)]


def on_all_ranks(work: list[Callable[[], Any]]) -> list[Any]:
    """Run each function in a thread of its own."""
    results: list[Any] = [None] * len(work)

    def run(rank: int) -> None:
        with torch.inference_mode():
            results[rank] = work[rank]()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def make_runners(model: Kraken, num_ranks: int, is_blocking: bool, backend: Backend) -> list[ModelRunner]:
    config = model.config
    columns = -(-NUM_IDS // num_ranks)
    channels = make_channels(num_ranks, num_buffer_bytes(24, config.width, columns, torch.float32))
    runners = []
    for rank in range(num_ranks):
        part = Part(config, rank, num_ranks)
        group = DeviceGroup(choose_kernels(CPU, torch.float32), rank, num_ranks, is_blocking=is_blocking)
        group.use_peers(channels[rank], lambda num_tokens: backend)
        weights = {name: weight.clone() for name, weight in weights_of(model, part).items()}
        runners.append(ModelRunner(Network(part, weights, NUM_IDS, group), num_blocks=16, tokens_per_block=4))
    return runners


@pytest.mark.parametrize(
    ("is_blocking", "backend"), [(False, "p2p_store"), (False, "copy_engine"), (True, "p2p_store")]
)
@pytest.mark.parametrize("variant", DIVISIBLE)
def test_passes_equal_those_of_one_device(variant: str, is_blocking: bool, backend: Backend) -> None:
    """Prompts in chunks, with and without logits, and single tokens: an odd or even number of messages in each pass."""
    model = make_model(variant)
    ids = torch.randint(NUM_IDS, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    blocks = list(range(8))
    steps = [
        StepBatch.concatenate([ids[:7]], [0], [blocks], [0], 4),
        StepBatch.concatenate([ids[7:20], ids[20:25]], [7, 0], [blocks, blocks[::-1]], [3, 5], 4),
        StepBatch.concatenate([ids[25:26], ids[26:27]], [20, 5], [blocks, blocks[::-1]], [1, 1], 4),
        StepBatch.concatenate([ids[27:28]], [21], [blocks], [1], 4),
    ]
    weights = {name: weight.clone() for name, weight in weights_of(model, Part(model.config)).items()}
    alone = ModelRunner(
        Network(Part(model.config), weights, NUM_IDS, DeviceGroup(choose_kernels(CPU, torch.float32))),
        num_blocks=16,
        tokens_per_block=4,
    )
    for num_ranks in (2,) if variant == "kraken_2way" else (2, 4):
        runners = make_runners(model, num_ranks, is_blocking, backend)
        passes_of = [lambda runner=runner: [runner.forward(step).logits_RV for step in steps] for runner in runners]  # type: ignore[misc]
        found = on_all_ranks(passes_of)
        assert all(passes is not None for passes in found)
        assert all(runner.network.group._channel._buffer_index == 0 for runner in runners)  # type: ignore[union-attr]
        for logits_RV, step in zip(found[0], steps, strict=True):
            assert logits_RV.shape == (sum(step.num_logits), NUM_IDS)
            torch.testing.assert_close(logits_RV, alone.forward(step).logits_RV, rtol=0, atol=2e-3)


def test_columns_are_gathered_also_where_a_buffer_is_small() -> None:
    channels = make_channels(2, buffer_bytes=4096)
    x_RRC = torch.randn(2, 5, 300)
    for num_rows in (1, 3, 5):  # 3 rows fit into a buffer, 5 do not

        def gather(rank: int, num_rows: int = num_rows) -> Tensor:
            gathered = P2pStore(TorchKernels(), channels[rank]).gather_columns(x_RRC[rank, :num_rows])
            channels[rank].end_pass()
            return gathered

        found = on_all_ranks([lambda: gather(0), lambda: gather(1)])
        assert torch.equal(found[0], torch.cat([x_RRC[0, :num_rows], x_RRC[1, :num_rows]], dim=1))
        assert torch.equal(found[1], x_RRC[1, :num_rows])


def test_whoever_waits_is_released() -> None:
    """For a rank that is gone."""
    channels = make_channels(2, buffer_bytes=4096)
    waits = threading.Thread(target=lambda: P2pStore(TorchKernels(), channels[0]).all_reduce(torch.ones(1, 8)))
    waits.start()
    channels[1].release()
    waits.join(10)
    assert not waits.is_alive() and all(bool((flags_P == RELEASED).any()) for flags_P in channels[0]._flags)


class SimulatedRank:
    """One rank of the protocol in `kraken/engine/distributed/peer_all_reduce.py`, an atomic action at a time."""

    def __init__(self, rank: int, world: "SimulatedWorld"):
        self.rank, self.world, self.message = rank, world, 0
        self.copies: deque[tuple[int, int]] = deque()
        """Work of the stream that copies: the buffers to copy and the messages to signal then."""

    def can_write(self) -> bool:
        return all(sent >= self.message for peer, sent in enumerate(self.world.signalled) if peer != self.rank)

    def signal(self, message: int) -> None:
        assert self.world.signalled[self.rank] == message - 1, "messages are signalled out of order"
        self.world.signalled[self.rank] = message

    def main_stream(self, num_passes: int) -> Iterator[str]:
        """What is done in its order; each `yield` is where others may go on, with what is waited for."""
        choices = random.Random(7)  # the same on every rank: all compute the same passes
        world = self.world
        others = [peer for peer in range(len(world.signalled)) if peer != self.rank]
        for _ in range(num_passes):
            buffer = 0
            for _ in range(choices.randrange(5)):
                kind = choices.choice(["publish", "gather", "p2p_store", "copy_engine"])
                while kind != "copy_engine" and self.copies:  # what the kernel tells comes behind them
                    yield "joining"
                while not self.can_write():
                    yield "write"
                self.message += 1
                if kind == "p2p_store":
                    for peer in others:
                        world.received[peer][self.rank][buffer] = self.message
                        yield "sending"
                else:
                    world.published[self.rank][buffer] = self.message
                    yield "publishing"
                if kind == "copy_engine":
                    self.copies.append((buffer, self.message))
                else:
                    self.signal(self.message)
                if kind in ("p2p_store", "copy_engine"):
                    yield "attention"
                if kind != "gather" or self.rank == 0:  # columns are gathered by the leader
                    while min(world.signalled[peer] for peer in others) < self.message:
                        yield "read"
                    for _ in range(2):
                        for peer in others:
                            is_sent = kind in ("p2p_store", "copy_engine")
                            place = world.received[self.rank][peer] if is_sent else world.published[peer]
                            world.read(place, buffer, self.message)
                        yield "reading"
                buffer = 1 - buffer
            while self.copies:
                yield "joining"
            if buffer:
                self.message += 1
                self.signal(self.message)

    def copying_stream(self) -> Iterator[str]:
        """Likewise, for ever."""
        while True:
            while not self.copies:
                yield "nothing"
            buffer, message = self.copies[0]
            for peer in range(len(self.world.signalled)):
                if peer != self.rank:
                    self.world.read(self.world.published[self.rank], buffer, message)
                    yield "copying"
                    self.world.received[peer][self.rank][buffer] = message
            self.signal(message)
            self.copies.popleft()
            yield "copied"


class SimulatedWorld:
    def __init__(self, num_ranks: int):
        self.signalled = [0] * num_ranks
        self.published = [[0, 0] for _ in range(num_ranks)]
        self.received = [[[0, 0] for _ in range(num_ranks)] for _ in range(num_ranks)]

    def read(self, buffers: list[int], buffer: int, value: int) -> None:
        assert buffers[buffer] == value, "a buffer was written before everybody had read it"


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_no_buffer_is_written_while_it_is_read(num_ranks: int) -> None:
    """Any order in which the ranks go on, of passes with any number of messages."""
    for seed in range(60):
        world, numbers = SimulatedWorld(num_ranks), random.Random(seed)
        ranks = [SimulatedRank(rank, world) for rank in range(num_ranks)]
        streams = [*(rank.main_stream(40) for rank in ranks), *(rank.copying_stream() for rank in ranks)]
        unfinished = set(range(num_ranks))
        favourite = numbers.randrange(len(streams))  # who runs as far ahead as it can
        for _ in range(200_000):
            if not unfinished:
                break
            chosen = favourite if numbers.random() < 0.7 else numbers.randrange(len(streams))
            if next(streams[chosen], None) is None:
                unfinished.discard(chosen)
        assert not unfinished, "the ranks wait for each other"


class TestChoice:
    def test_what_cannot_work_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"engine.all_reduce=p2p is for CUDA.*device=cpu"):
            EngineConfig(all_reduce="p2p", device="cpu", num_devices=2)
        with pytest.raises(ConfigError, match=r"engine.all_reduce=nccl has no effect.*num_devices=1"):
            EngineConfig(all_reduce="nccl")
        assert EngineConfig(all_reduce="p2p", num_devices=2).all_reduce == "p2p"

    def test_sizes_and_what_is_used_between_them(self) -> None:
        assert choose_backend.candidate_sizes(1) == [1] and choose_backend.candidate_sizes(24) == [1, 2, 4, 8, 16, 24]
        sizes, backends = [1, 2, 4, 6], ["p2p_store", "p2p_store", "nccl", "copy_engine"]
        found = [choose_backend.backend_for(sizes, backends, count) for count in (1, 2, 3, 4, 5, 6, 7)]  # type: ignore[arg-type]
        assert found == ["p2p_store", "p2p_store", "nccl", "nccl", "copy_engine", "copy_engine", "copy_engine"]

    def test_what_was_chosen_is_one_line(self) -> None:
        times: Any = {"nccl": [2e-5, 3e-5], "p2p_store": [1e-5, 4e-5], "copy_engine": [math.inf, 5e-5]}
        assert choose_backend.describe([1, 512], ["p2p_store", "nccl"], times) == (
            "p2p_store up to 1 tokens, nccl up to 512 tokens (microseconds of the first layers: "
            "1 tokens nccl 20.0, p2p_store 10.0; 512 tokens nccl 30.0, p2p_store 40.0, "
            "copy_engine 50.0)"
        )

    @pytest.mark.parametrize("setting", ["auto", "p2p"])
    def test_devices_of_two_hosts_use_nccl(
        self, setting: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Both ranks decide alike, from what both say."""
        properties = SimpleNamespace(uuid="gpu")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(choose_backend, "_problem", lambda dtype: "")
        store = HashStore()
        store.set_timeout(timedelta(seconds=20))
        there = {"problem": "", "host": ["elsewhere", ""], "gpu": "another"}
        store.set("all_reduce/places/1", json.dumps(there))
        shapes = choose_backend.MessageShapes(
            num_ways=1, width=8, max_tokens=4, num_columns=8, dtype=torch.float32, is_kraken=True
        )
        group, device = DeviceGroup(TorchKernels(), 0, 2), torch.device("cuda", 0)
        caplog.set_level("INFO")
        if setting == "p2p":
            with pytest.raises(
                WorkerError, match=r"engine.all_reduce=p2p does not work here: the devices are on different"
            ):
                choose_backend.choose_backend(group, store, device, shapes, lambda x_WTD: None, setting, True, 1.0)
        else:
            choose_backend.choose_backend(group, store, device, shapes, lambda x_WTD: None, setting, True, 1.0)
            assert "nccl, since peer memory does not work: the devices are on different hosts" in caplog.text


def test_meetings_are_counted_from_the_first() -> None:
    """A leader that has met other followers before, and one that has met nobody, use the same keys."""
    from kraken.engine.distributed.peer_memory import _Renumbered

    shared = HashStore()
    leader, follower = _Renumbered(shared), _Renumbered(shared)
    leader.set("Memory/12/0", b"\x00\xff")
    thread = threading.Thread(target=follower.set, args=("Memory/0/1", b"b"))
    thread.start()
    leader.wait(["Memory/12/1"])
    thread.join()
    assert leader.get("Memory/12/1") == b"b" and follower.get("Memory/0/0") == b"\x00\xff"
    leader.set("Memory/13/0", b"c")
    assert follower.get("Memory/1/0") == b"c"


def test_the_next_norm_may_come_with_a_sum() -> None:
    """The interface's own `all_reduce_add_norm`, on one rank alone."""
    torch.manual_seed(0)
    x_1TD, part_1TD = torch.randn(2, 1, 3, 8)
    norm = Norm(torch.randn(1, 8), None)
    total_1TD, normed_1TD = LocalAllReduce(TorchKernels()).all_reduce_add_norm(x_1TD, part_1TD, norm)
    assert torch.equal(total_1TD, x_1TD + part_1TD)
    assert normed_1TD is not None
    torch.testing.assert_close(normed_1TD, F.layer_norm(total_1TD, (8,), norm.weight_WD[0]))
