"""Data: documents (corpora) become token shards, which a loader reads in an order that one number describes."""
