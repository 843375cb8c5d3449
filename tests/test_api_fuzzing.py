"""Requests made from the endpoint's own description, right ones and wrong ones, against a real engine: the description
holds, nothing hangs, no server error, and no block of the KV cache stays behind."""

import dataclasses
import os
import time

import pytest
from test_api import TEMPLATE, listening, torch_model

from kraken.tokenizer import Tokenizer
from serve.chat_template import ChatTemplate

pytestmark = pytest.mark.slow

NUM_REQUESTS = int(os.environ.get("KRAKEN_FUZZ_REQUESTS", "1000"))
"""In all, about; 10,000 take some ten minutes on two cores."""
TIMEOUT_S = 20.0


def test_the_description_holds_for_right_and_wrong_requests() -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis import GenerationMode, checks

    checks.load_all_checks()
    kept = [
        checks.CHECKS.get_one(name)
        for name in (
            "not_a_server_error",
            "status_code_conformance",
            "content_type_conformance",
            "response_schema_conformance",
            "response_headers_conformance",
            "negative_data_rejection",
            "unsupported_method",
        )
    ]
    base = torch_model(Tokenizer.train(["the cat sat on the mat and so forth, quickly " * 20], 280))
    model = dataclasses.replace(base, chat_template=ChatTemplate(TEMPLATE))
    num_sent, statuses = 0, dict[int, int]()
    with listening(model) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        with_body = [operation for operation in operations if operation.body]
        for operation in operations:
            num_examples = NUM_REQUESTS // (4 * len(with_body)) if operation in with_body else 10
            if operation.path == "/v1/completions":
                num_examples = NUM_REQUESTS // 3
            for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
                if mode is GenerationMode.NEGATIVE and operation not in with_body:
                    continue

                @settings(
                    max_examples=num_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
                )
                @given(case=operation.as_strategy(generation_mode=mode))
                def send(case: schemathesis.Case) -> None:
                    nonlocal num_sent
                    response = case.call(timeout=TIMEOUT_S)
                    num_sent += 1
                    statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
                    case.validate_response(response, checks=kept)

                send()
        deadline = time.monotonic() + TIMEOUT_S
        while (stats := model.engine.stats()).num_running + stats.num_queued:
            assert time.monotonic() < deadline, stats
            time.sleep(0.05)
    print(f"{num_sent} requests, by status {statuses}; {stats}")
    assert stats.num_free_blocks == stats.num_blocks and stats.num_finished > NUM_REQUESTS / 20
    assert num_sent >= NUM_REQUESTS * 0.8 and not any(status >= 500 for status in statuses)
