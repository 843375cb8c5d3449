"""The OpenAI-compatible endpoint: a Ray Serve application around one engine per replica."""
