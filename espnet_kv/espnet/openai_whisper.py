"""ESPnet's Whisper classes with the openai-whisper of PyPI.

ESPnet 202611 is written for an older fork: `whisper.audio` there has N_MELS, and a tokenizer has
the attribute `tokenizer` with the methods of Hugging Face's GPT2TokenizerFast. Both are added
within `whisper_for_espnet`, if they are missing. There, ESPnet's classes also get their weights
from `espnet_kv.espnet.whisper_weights`.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import cache
from typing import Any

from torch import nn

from espnet_kv.errors import UserError
from espnet_kv.espnet.replacing import replaced
from espnet_kv.espnet.whisper_weights import load_whisper, whisper_package

MELS = 80  # of all models before large-v3
SAMPLE_RATE = 16000
WINDOW = 30.0  # seconds that the encoder takes
HOP = 160  # samples from one frame to the next
# merges of GPT-2's vocabulary, and of the multilingual one: <|endoftext|> counts in the first
VOCABULARY = 50257
TIMESTAMP = "<|0.00|>"


def too_long(seconds: float, most: float) -> UserError:
    """The refusal of an utterance."""
    return UserError(
        f"an utterance of {seconds:.2f} s is longer than the {most:g} s that Whisper encodes: cut "
        "it into segments at pauses, or leave it out"
    )


def uses_whisper(config: Mapping[str, Any]) -> bool:
    """Whether a configuration has a part for which ESPnet needs openai-whisper."""
    parts = ("encoder", "decoder", "frontend", "token_type", "bpemodel", "model_type")
    return any("whisper" in str(config.get(part)) for part in parts)


@contextmanager
def whisper_for_espnet(
    dims: Mapping[str, int] | None = None,
) -> Iterator[list[dict[str, int]]]:
    """Make ESPnet's Whisper classes work within the block, with any openai-whisper.

    Models and tokenizers that are built in the block stay usable after it.

    Args:
        dims: see `espnet_kv.espnet.whisper_weights.load_whisper`.

    Yields:
        The dimensions of the models that were loaded in the block.

    Raises:
        UserError: openai-whisper is not installed.
    """
    whisper = whisper_package()
    loaded: list[dict[str, int]] = []

    def load_model(name: str, device: Any = None, download_root: str | None = None) -> Any:
        model = load_whisper(name, download_root, dims)
        loaded.append(asdict(model.dims))
        return model

    own = getattr(whisper.load_model, "own", whisper.load_model)
    load_model.own = own  # type: ignore[attr-defined]
    with ExitStack() as stack:
        enter = stack.enter_context
        # load_whisper knows more names than the package, and says which
        enter(replaced(whisper, load_model=load_model, available_models=_AnyName))
        enter(replaced(whisper.audio, N_MELS=getattr(whisper.audio, "N_MELS", MELS)))
        enter(replaced(whisper.tokenizer, get_tokenizer=_with_hugging_face_methods(whisper)))
        yield loaded


def replace_norms(model: nn.Module) -> None:
    """Replace openai-whisper's LayerNorm, which fails with parameters of other types than float32.

    Parameters and, in float32, outputs stay the same.
    """
    for module in model.modules():
        for name, norm in module.named_children():
            if isinstance(norm, nn.LayerNorm):
                plain = nn.LayerNorm(norm.normalized_shape, norm.eps)
                plain.weight, plain.bias = norm.weight, norm.bias
                setattr(module, name, plain)


def with_whisper(config: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """`whisper_for_espnet` if the configuration needs it, else a context without effect."""
    return whisper_for_espnet() if uses_whisper(config) else nullcontext()


def build_within(build: Any) -> Any:
    """A function that calls `build` within `whisper_for_espnet` if an argument names Whisper."""

    def build_if_needed(*args: Any, **options: Any) -> Any:
        with with_whisper(options):
            return build(*args, **options)

    return build_if_needed


class _AnyName:
    def __contains__(self, name: object) -> bool:
        return True


@cache
def _bytes_of_characters() -> dict[str, int]:
    """The printable characters by which GPT-2's vocabulary writes bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


@cache
def _characters_of_bytes() -> dict[int, str]:
    return {byte: character for character, byte in _bytes_of_characters().items()}


def _to_text(token: bytes) -> str:
    return "".join(map(_characters_of_bytes().__getitem__, token))


def _to_bytes(token: str) -> bytes:
    table = _bytes_of_characters()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()  # an added token


def _with_hugging_face_methods(whisper: Any) -> Any:
    """The package's get_tokenizer, with results that have the attribute `tokenizer`."""
    own = getattr(whisper.tokenizer.get_tokenizer, "own", whisper.tokenizer.get_tokenizer)

    def get_tokenizer(*args: Any, **kwargs: Any) -> Any:
        made = own(*args, **kwargs)
        if not hasattr(made, "tokenizer"):
            made = copy.copy(made)  # the package keeps and returns the same object
            made.tokenizer = ByteLevelTokenizer(made.encoding)
        return made

    get_tokenizer.own = own  # type: ignore[attr-defined]
    return get_tokenizer


class ByteLevelTokenizer:
    """The methods of Hugging Face's GPT2TokenizerFast that ESPnet calls, on a tiktoken encoding.

    Tokens are written as in GPT-2's vocabulary, a space as "Ġ". Timestamps are no tokens of it
    before they are added, as in the fork: ids of tokens that are added earlier depend on it.

    Args:
        encoding: a `tiktoken.Encoding`.
    """

    def __init__(self, encoding: Any):
        self._ranks = dict(encoding._mergeable_ranks)  # the names that tiktoken's README gives
        self._pattern, self._name = encoding._pat_str, encoding.name
        own = dict(encoding._special_tokens)
        first = own.get(TIMESTAMP, float("inf"))
        self._added = {token: index for token, index in own.items() if index < first}
        self._skipped = set(self._added.values())
        self._encoding: Any = None
        self._tokens: dict[int, str] = {}
        self._index: dict[str, int] = {}
        self.vocab_size = VOCABULARY

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_encoding": None, "_tokens": {}, "_index": {}}

    def get_added_vocab(self) -> dict[str, int]:
        """Special and added tokens and their ids."""
        return dict(self._added)

    def add_tokens(self, tokens: Iterable[str]) -> int:
        """Add tokens behind all others; returns the number of new ones."""
        known, before = self._ids(), len(self._added)
        new = [token for token in dict.fromkeys(tokens) if token not in known]
        first = max(self._added.values()) + 1
        self._added |= {token: first + index for index, token in enumerate(new)}
        self._encoding, self._tokens = None, {}
        return len(self._added) - before

    def add_special_tokens(self, tokens: Mapping[str, Iterable[str]]) -> int:
        """Add tokens that `convert_ids_to_tokens` can skip."""
        given = [token for kind in tokens.values() for token in kind]
        count = self.add_tokens(given)
        self._skipped |= {self._ids()[token] for token in given}
        return count

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """Split a text into tokens; added tokens in it are found."""
        if self._encoding is None:
            import tiktoken

            self._encoding = tiktoken.Encoding(
                self._name,
                pat_str=self._pattern,
                mergeable_ranks=self._ranks,
                special_tokens=self._added,
            )
        names = self._names()
        return [names[index] for index in self._encoding.encode(text, allowed_special="all")]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Tokens of ids, or the token of one id."""
        if isinstance(ids, int):
            return self._names()[ids]
        kept = [int(i) for i in ids if not (skip_special_tokens and int(i) in self._skipped)]
        return [self._names()[index] for index in kept]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Ids of tokens, or the id of one; <|endoftext|> stands for an unknown one."""
        if isinstance(tokens, str):
            return self._ids().get(tokens, self._added["<|endoftext|>"])
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text of tokens."""
        return b"".join(map(_to_bytes, tokens)).decode(errors="replace")

    def _names(self) -> dict[int, str]:
        if not self._tokens:
            self._tokens = {index: _to_text(token) for token, index in self._ranks.items()}
            self._tokens |= {index: token for token, index in self._added.items()}
            self._index = {token: index for index, token in self._tokens.items()}
        return self._tokens

    def _ids(self) -> dict[str, int]:
        self._names()
        return self._index
