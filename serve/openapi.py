"""The endpoint's description of itself: an OpenAPI document, and the same as a page without scripts.

Both are made from the table of operations and from the pydantic models that check requests and write responses, so that
the description cannot differ from what happens.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

import kraken
from kraken.engine.protocol import EngineInfo
from serve.pages import Page
from serve.protocol import ErrorBody

REF = "#/components/schemas/{model}"
ERRORS = {
    400: "The request cannot be served as it is; the message says what to change.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "Too many requests wait already; come back after the seconds in Retry-After.",
    500: "The engine or the server failed.",
    503: "The model cannot be used now.",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one URL."""

    method: str
    path: str
    """As the routes have it."""
    summary: str
    body: type[BaseModel] | None
    """Model of the request's JSON."""
    response: type[BaseModel] | str
    """Model of the response's JSON, or the media type of another response."""
    errors: tuple[int, ...] = ()
    """Statuses that are possible beside those of every operation of its kind."""
    is_open: bool = False
    """Whether it needs no API key."""

    @property
    def url(self) -> str:
        """The path as OpenAPI writes it."""
        return self.path.replace("{name:path}", "{model}")

    @property
    def statuses(self) -> list[int]:
        """Of errors."""
        of_kind = (() if self.is_open else (401,)) + ((400, 413) if self.body else ())
        return sorted({*of_kind, *self.errors})


@dataclass(frozen=True, slots=True)
class Document:
    """An OpenAPI document."""

    value: Mapping[str, Any]

    @property
    def json(self) -> bytes:
        return json.dumps(self.value).encode()


def document(operations: Sequence[Operation], missing: Mapping[str, str], info: EngineInfo) -> Document:
    """The OpenAPI document of an endpoint.

    Args:
        missing: URL -> why it is refused, of what OpenAI has and this endpoint has not.
    """
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [(ErrorBody, "serialization")]
    for operation in operations:
        if operation.body:
            models.append((operation.body, "validation"))
        if not isinstance(operation.response, str):
            models.append((operation.response, "serialization"))
    references, definitions = models_json_schema(models, ref_template=REF)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.url, {})[operation.method.lower()] = _describe(operation, references)
    absent = " ".join(f"{path} is refused: {reason}." for path, reason in missing.items())
    return Document(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Kraken",
                "version": kraken.__version__,
                "description": (
                    f"OpenAI's completions API. The context has {info.context_length} tokens, prompt and completion "
                    f"together. {absent} Unknown fields of a request are refused; null means that a field is left out."
                ),
            },
            "paths": paths,
            "components": {
                "schemas": definitions["$defs"],
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
        }
    )


def _describe(operation: Operation, references: Mapping[Any, Any]) -> dict[str, Any]:
    """
    Args:
        references: (model, mode) -> reference to its schema.
    """
    if isinstance(operation.response, str):
        content: dict[str, Any] = {operation.response: {}}
    else:
        content = {"application/json": {"schema": references[operation.response, "serialization"]}}
    description = "The response"
    if operation.body and "stream" in operation.body.model_fields:
        content["text/event-stream"] = {"schema": {"type": "string"}}
        description += "; with stream=true server-sent events, each with a part of it, and [DONE] as the last"
    error = {"application/json": {"schema": references[ErrorBody, "serialization"]}}
    responses: dict[str, Any] = {"200": {"description": f"{description}.", "content": content}}
    if operation.path == "/health":
        responses["503"] = {"description": ERRORS[503], "content": content}
    for status in operation.statuses:
        responses[str(status)] = {"description": ERRORS[status], "content": error}
    described: dict[str, Any] = {
        "operationId": operation.path.strip("/").replace("{name:path}", "one").replace("/", "_") or "page",
        "summary": operation.summary,
        "responses": responses,
        "security": [] if operation.is_open else [{"key": []}, {}],
    }
    if operation.body:
        schema = references[operation.body, "validation"]
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{model}" in operation.url:
        described["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return described


STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
code, .method { font-family: ui-monospace, monospace; }
section { border-top: 1px solid #8886; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #8883; }
th { font-weight: 600; white-space: nowrap; }
"""


def docs_page(described: Document) -> Page:
    """The document as a page."""
    value = described.value
    body = [f"<h1>{escape(value['info']['title'])} {escape(value['info']['version'])}</h1>"]
    body.append(f"<p>{escape(value['info']['description'])}</p>")
    body.append('<p>For programs: <a href="openapi.json">openapi.json</a></p>')
    for url, methods in value["paths"].items():
        for method, operation in methods.items():
            body.append(f'<section><h2><span class="method">{method.upper()} {escape(url)}</span></h2>')
            body.append(f"<p>{escape(operation['summary'])}.{'' if operation['security'] else ' Needs no key.'}</p>")
            for schema in _schemas(operation.get("requestBody", {})):
                body.append(f"<h3>Request</h3>{_table(schema, value)}")
            body.append("<h3>Responses</h3><table>")
            for status, response in operation["responses"].items():
                names = ", ".join(escape(_name(schema)) for schema in _schemas(response)) or "text"
                body.append(f"<tr><th>{status}</th><td>{escape(response['description'])}</td><td>{names}</td></tr>")
            body.append("</table></section>")
    body.append("<section><h2>Objects</h2>")
    for name, schema in value["components"]["schemas"].items():
        body.append(f'<h3 id="{escape(name)}">{escape(name)}</h3>{_table(schema, value)}')
    body.append("</section>")
    head = f'<meta charset="utf-8"><title>Kraken: API</title><style>{STYLE}</style>'
    return Page(f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>')


def _schemas(holder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for media in holder.get("content", {}).values():
        if "schema" in media:
            yield media["schema"]


def _name(schema: Mapping[str, Any]) -> str:
    """The type of a schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[-1])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_name(option) for option in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_name(schema['items'])}" if "items" in schema else "list"
    return str(schema.get("type", "any"))


def _table(schema: Mapping[str, Any], value: Mapping[str, Any]) -> str:
    """The fields of an object."""
    if "$ref" in schema:
        schema = value["components"]["schemas"][_name(schema)]
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = f"; default {json.dumps(field['default'])}" if field.get("default") not in (None, [], {}) else ""
        needed = "; required" if name in schema.get("required", ()) else ""
        kind = escape(_name(field) + default + needed)
        text = escape(field.get("description", ""))
        rows.append(f"<tr><th><code>{name}</code></th><td>{kind}</td><td>{text}</td></tr>")
    return f"<table>{''.join(rows)}</table>"
