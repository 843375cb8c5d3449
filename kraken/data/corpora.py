"""Which corpus a data config names. Each is imported when it is needed: `datasets` costs seconds."""

from kraken.config import DataConfig
from kraken.data.corpus import Corpus


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that a data config names; not for `nanogpt`, which holds tokens instead of documents."""
    match config.corpus:
        case "files":
            from kraken.data.files import FilesCorpus

            return FilesCorpus(config.paths, config.text_field)
        case "huggingface":
            from kraken.data.huggingface import HuggingFaceCorpus

            return HuggingFaceCorpus(config)
        case "embedded":
            from kraken.data.embedded import EmbeddedCorpus

            return EmbeddedCorpus()
    raise AssertionError(f"{config.corpus} is not a corpus of documents")
