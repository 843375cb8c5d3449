"""Chat templates: from the turns of a conversation to a prompt. They are Jinja, as Hugging Face's tokenizers have them,
and run in a sandbox in which they can change nothing.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kraken.config import ConfigError
from kraken.tokenizer import END_OF_TEXT
from serve.protocol import ApiError

TEMPLATE_NAME = "chat_template.jinja"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"


class ChatTemplate:
    """A chat template.

    Raises:
        ConfigError: it is not valid Jinja.
    """

    def __init__(self, source: str):
        self.source = source
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the model's chat template is no valid Jinja: {error}; mend it, or delete it") from error

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate | None":
        """The template of an exchange folder: `chat_template.jinja`, or the field `chat_template` of
        `tokenizer_config.json`; None if it has neither."""
        file, config = folder / TEMPLATE_NAME, folder / TOKENIZER_CONFIG_NAME
        if file.is_file():
            return cls(file.read_text(encoding="utf-8"))
        source = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
        return cls(source) if isinstance(source, str) else None

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that ends where the assistant's answer begins.

        Args:
            messages: `role` and `content` of each turn.
        Raises:
            ApiError: the template refuses these messages.
        """
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=True,
                bos_token=END_OF_TEXT,
                eos_token=END_OF_TEXT,
            )
        except TemplateError as error:
            message = f"the model's chat template refuses these messages: {error}"
            raise ApiError(400, message, param="messages", code="invalid_value") from error


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
