"""The model as training sees it: architecture, norms, loss, and the processes that share one model's ways."""

from kraken.model.architecture import Kraken as Kraken
