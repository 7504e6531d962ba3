"""Words of token ids, as the ``tokenizer.json`` of a tokenizer lists them. Nothing of the file is run."""

from __future__ import annotations

import json
from pathlib import Path

from onnxprune.errors import InputError


def read_words(path: Path) -> dict[int, str]:
    """Pieces of text by token id, marks of the tokenizer such as ``##`` included.

    Raises:
        InputError: the file is not readable, or lists no vocabulary.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}; --tokenizer wants the tokenizer.json of the model") from error
    try:
        listed = content["model"]["vocab"]
        # WordPiece, BPE and WordLevel map words to ids; Unigram lists pairs of word and score.
        pairs = listed.items() if isinstance(listed, dict) else [(word, number) for number, (word, *_) in enumerate(listed)]
        words = {int(number): str(word) for word, number in pairs}
        words |= {int(added["id"]): str(added["content"]) for added in content.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} lists no vocabulary under model.vocab; --tokenizer wants the tokenizer.json of the model") from error
    return words
