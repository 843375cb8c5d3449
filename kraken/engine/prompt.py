"""From the text of a prompt to its ids: the same for the endpoint and for the command line."""

from kraken.engine.protocol import ContextLengthExceeded, RequestError
from kraken.tokenizer import END_OF_TEXT, EncodingError, Tokenizer


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text in which `<|endoftext|>` stands for the end of a document, as OpenAI defines it.

    An empty text has no ids here.

    Raises:
        RequestError: the tokenizer cannot encode the text.
    """
    first, *others = text.split(END_OF_TEXT)
    try:
        ids = tokenizer.encode(first)
        for other in others:
            ids += [tokenizer.eot_id, *tokenizer.encode(other)]
    except EncodingError as error:
        raise RequestError(f"prompt cannot be encoded: {error}", "prompt") from error
    return ids


def encode_for_completion(tokenizer: Tokenizer, text: str, max_tokens: int, context_length: int) -> list[int]:
    """Ids of a prompt that is to be completed; at least one.

    A model cannot be asked what follows nothing, so an empty text is the beginning of a document: the end-of-text id.

    Raises:
        RequestError: the text holds half of a surrogate pair, as arguments that are not UTF-8 do.
        ContextLengthExceeded: the text is so long that its tokens cannot fit. It is not encoded then, since megabytes
            of text take seconds and gigabytes of memory.
    """
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise RequestError(f"prompt is not valid Unicode at character {error.start}; send UTF-8", "prompt") from None
    if num_bytes > context_length:  # otherwise there are not more tokens than the context has places
        longest = max(len(END_OF_TEXT), *map(len, tokenizer.ranks))
        fewest = -(-num_bytes // longest)
        if fewest > context_length + 1:  # one more than the context may be scored
            raise ContextLengthExceeded(fewest, max_tokens, context_length, is_lower_bound=True)
    return encode_prompt(tokenizer, text) or [tokenizer.eot_id]
