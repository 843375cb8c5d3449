"""The scheduler and the block pool: who runs, who waits, who is preempted, and which blocks are reused."""

import random

from kraken.engine.kv_cache import BlockPool, BlockTable
from kraken.engine.protocol import Request, SamplingParams
from kraken.engine.request_state import RequestState
from kraken.engine.scheduler import Scheduler


class TestBlocks:
    def test_blocks_are_shared_found_again_and_returned(self) -> None:
        pool, ids = BlockPool(6, 2), [1, 2, 3, 4, 5]
        table = pool.allocate(pool.find_prefix(ids), 5, 5)
        pool.publish(table, ids, 5)
        found = pool.find_prefix([*ids[:4], 9])
        assert found.blocks == table.blocks[:2] and pool.num_needed(found, 5) == 1
        other = pool.allocate(found, 5, 5)
        assert pool.num_free == 2
        pool.release(table)
        assert pool.num_free == 3 and pool.find_prefix(ids).blocks == other.blocks[:2]
        pool.release(other)
        assert pool.num_free == 6 and not other.blocks
        assert len(pool.find_prefix(ids).blocks) == 2  # free, and still there
        whole = pool.allocate(BlockTable(), 12, 12)
        assert not pool.find_prefix(ids).blocks and pool.num_free == 0
        pool.release(whole)

    def test_a_sequence_grows_in_place_while_there_is_room(self) -> None:
        pool = BlockPool(16, 4)
        tables = [pool.allocate(BlockTable(), 4, 16) for _ in range(4)]
        for num_tokens in (8, 12, 16):
            for table in tables:
                pool.extend(table, num_tokens)
        assert [list(table.blocks) for table in tables] == [list(range(4 * i, 4 * i + 4)) for i in range(4)]

    def test_the_longest_free_block_is_overwritten_first(self) -> None:
        pool = BlockPool(3, 1)
        for token in (1, 2, 3):
            table = pool.allocate(BlockTable(), 1, 1)
            pool.publish(table, [token], 1)
            pool.release(table)
        pool.allocate(BlockTable(), 1, 1)
        assert [len(pool.find_prefix([token, 0]).blocks) for token in (1, 2, 3)] == [0, 1, 1]

    def test_what_is_not_to_be_trusted_is_not_found(self) -> None:
        pool = BlockPool(4, 1)
        table = pool.allocate(BlockTable(), 2, 2)
        pool.publish(table, [1, 2], 2)
        pool.release(table, invalidate=True)
        assert not pool.find_prefix([1, 2, 3]).blocks and pool.num_free == 4


class TestScheduling:
    def state(self, num_tokens: int, max_tokens: int = 4) -> RequestState:
        ids = tuple(range(num_tokens))
        sampling = SamplingParams(max_tokens=max_tokens)
        return RequestState(Request(id=str(id(ids)), prompt_ids=ids, sampling=sampling), lambda item: None)

    def steps(self, scheduler: Scheduler) -> list[tuple[RequestState, int, int]]:
        step = scheduler.schedule()
        for scheduled in step:
            if scheduled.is_last:
                scheduled.state.token_ids.append(0)
        return [(scheduled.state, scheduled.first_position, scheduled.end) for scheduled in step]

    def test_prompts_are_cut_to_the_budget_and_share_steps_with_decoding(self) -> None:
        scheduler = Scheduler(BlockPool(32, 2, reuse=False), 4, 6, 100)
        a, b = self.state(4), self.state(9)
        scheduler.add(a)
        scheduler.add(b)
        assert self.steps(scheduler) == [(a, 0, 4), (b, 0, 2)]
        assert self.steps(scheduler) == [(a, 4, 5), (b, 2, 7)]
        assert self.steps(scheduler) == [(a, 5, 6), (b, 7, 9)]
        assert self.steps(scheduler) == [(a, 6, 7), (b, 9, 10)]

    def test_first_come_first_served_even_where_a_later_one_would_fit(self) -> None:
        scheduler = Scheduler(BlockPool(8, 1, reuse=False), 4, 16, 100)
        running, large, small = self.state(5), self.state(6), self.state(2)
        for state in (running, large, small):
            scheduler.add(state)
        assert [s for s, _, _ in self.steps(scheduler)] == [running]
        scheduler.remove(running)
        assert [s for s, _, _ in self.steps(scheduler)] == [large]

    def test_the_newest_gives_way_and_comes_back_first(self) -> None:
        scheduler = Scheduler(BlockPool(6, 1, reuse=False), 4, 16, 100)
        old, new, queued = self.state(2), self.state(2), self.state(1)
        for state in (old, new, queued):
            scheduler.add(state)
        assert [s for s, _, _ in self.steps(scheduler)] == [old, new]
        assert [s for s, _, _ in self.steps(scheduler)] == [old, new]
        assert self.steps(scheduler) == [(old, 3, 4)]
        assert list(scheduler.waiting) == [new, queued]
        assert [state.was_admitted for state in scheduler.waiting] == [True, False]
        scheduler.remove(old)
        assert self.steps(scheduler)[0] == (new, 0, 4)

    def test_everybody_finishes_in_any_workload(self) -> None:
        numbers = random.Random(5)
        for _ in range(30):
            pool = BlockPool(numbers.randrange(12, 30), numbers.randrange(1, 4), numbers.random() < 0.5)
            scheduler = Scheduler(pool, numbers.randrange(1, 6), numbers.randrange(6, 20), 100)
            ends = {self.state(numbers.randrange(1, 7), numbers.randrange(1, 5)): 0 for _ in range(20)}
            for state in ends:
                ends[state] = len(state.token_ids) + state.request.sampling.max_tokens
                scheduler.add(state)
            for _ in range(2000):
                self.steps(scheduler)
                for state in [s for s in scheduler.running if len(s.token_ids) == ends[s]]:
                    scheduler.remove(state)
                held = [block for s in scheduler.running for block in s.block_table.blocks]
                assert len(set(held)) + pool.num_free == pool.num_blocks
                if not scheduler.running and not scheduler.waiting:
                    break
            assert not scheduler.running and not scheduler.waiting and pool.num_free == pool.num_blocks
