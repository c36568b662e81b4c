"""ESPnet's offline inference with our classes, replaced within a context.

ESPnet's Speech2Text fails with a traceback for audio that is too short, models of 16 bits and beams
larger than the vocabulary. The subclass here handles these cases.
"""

import argparse
import functools
import inspect
import logging
from collections.abc import Mapping
from itertools import batched, chain, islice
from typing import Any

import torch
from espnet2.asr.encoder.whisper_encoder import OpenAIWhisperEncoder
from espnet2.asr.frontend.default import DefaultFrontend
from espnet2.bin import asr_inference as espnet
from espnet2.bin.asr_inference import Hypothesis, TooShortUttError
from espnet2.tasks.lm import LMTask
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from typeguard import TypeCheckError

from espnet_kv.errors import ArgumentError, UserError, one_line
from espnet_kv.espnet.ctc_prefix import FastCTCPrefixScorer, WideCTCPrefixScorer
from espnet_kv.espnet.loading import (
    check_finite,
    load_tokenizer,
    read_checkpoint,
    read_config,
    refuse_partial_loads,
)
from espnet_kv.espnet.long_audio import joined, most_samples, windows
from espnet_kv.espnet.openai_whisper import build_within
from espnet_kv.espnet.packs import unpacked
from espnet_kv.espnet.parser import PAIRS, check_search
from espnet_kv.espnet.replacing import replaced
from espnet_kv.espnet.task import ASRTask, CachedDecodingTask
from espnet_kv.lm.transformer_lm import KVTransformerLM
from espnet_kv.names import plain_names
from espnet_kv.packed import pack_weights

OTHER_SEARCHES = ("enh_s2t_task", "multi_asr", "time_sync", "partial_ar")
_SIGNATURE = inspect.signature(espnet.Speech2Text)


class Speech2Text(espnet.Speech2Text):
    """espnet2.bin.asr_inference.Speech2Text with strict loading and a search with true caches.

    Arguments, results and scores are ESPnet's: nbest tuples of text, tokens, token ids and
    hypothesis. A stock `transformer` decoder or language model becomes kv_transformer, a `whisper`
    decoder kv_whisper. Feature statistics and the tokenizer may also be beside the model. Short
    audio and a dtype of 16 bits work. ESPnet's inference module is restored when the object is
    complete.

    Args:
        *args: as ESPnet's.
        kv_decoder: search with a cached decoder and language model in place of stock ones
            (`transformer`, `whisper`).
        fast_ctc: compute CTC prefix scores of all frames at once.
        **options: as ESPnet's.

    Raises:
        UserError: names the argument or the file that cannot be used.
    """

    def __init__(
        self, *args: Any, kv_decoder: bool = True, fast_ctc: bool = True, **options: Any
    ) -> None:
        bound = _SIGNATURE.bind(*args, **options)
        bound.apply_defaults()
        given = bound.arguments
        _check(given)
        lm_task = language_model_task(LMTask, kv_decoder)
        ours = {
            "ASRTask": search_task(kv_decoder, given["partial_ar"]),
            "LMTask": lm_task,
            "CTCPrefixScorer": FastCTCPrefixScorer if fast_ctc else WideCTCPrefixScorer,
        }
        for name in ("build_tokenizer", "OpenAIWhisperTokenIDConverter"):
            ours[name] = build_within(getattr(espnet, name))
        try:
            with replaced(espnet, **ours):
                super().__init__(**given)
        except TypeCheckError as error:
            raise UserError(one_line(error)) from error
        except ModuleNotFoundError as error:
            if error.name != "kenlm":
                raise
            raise ArgumentError("ngram_file", "needs the Python package kenlm") from error
        except (AttributeError, AssertionError) as error:
            # searches and models that ESPnet does not check for
            others = [name for name in OTHER_SEARCHES if given[name]]
            if not others:
                raise
            message = f"does not go with this model ({one_line(error)}); leave it out"
            raise ArgumentError(others[0], f"true {message}") from error
        if given["multi_asr"] and self.asr_train_args.model != "pit_espnet":
            message = "true is for models of several speakers (model: pit_espnet); leave it out"
            raise ArgumentError("multi_asr", message)
        if given["time_sync"] and not hasattr(self.beam_search, "nn_dict"):
            message = "true: ESPnet's own decoding fails with this search; leave it out"
            raise ArgumentError("time_sync", message)
        lm_tokens = getattr(lm_task, "tokens", None)  # None: there is no language model
        if lm_tokens is not None and list(lm_tokens) != list(self.asr_model.token_list):
            raise ArgumentError(
                "lm_train_config",
                f"{given['lm_train_config']}: its token_list is not that of the ASR model; give a "
                "language model of the same tokens",
            )
        # ESPnet would fail at the first text
        load_tokenizer(self.asr_train_args, given["token_type"], given["bpemodel"])
        tokens, beam = len(self.asr_model.token_list), given["beam_size"]
        if beam > tokens:
            raise ArgumentError(
                "beam_size",
                f"{beam} is more than the {tokens} tokens of the model; give a smaller one",
            )
        if given["dtype"] in ("float16", "bfloat16"):
            _features_in_32_bits(self.asr_model, getattr(torch, given["dtype"]))
            self.dtype = "float32"  # type of the audio
        encoder = self.asr_model.encoder
        if isinstance(encoder, OpenAIWhisperEncoder) and not encoder.do_pad_trim:
            # it sees what fills up a batch
            self.asr_model.encode = functools.partial(_encode_apart, self.asr_model)
        pack_weights(encoder)
        if hasattr(self.asr_model.decoder, "prepare_search"):
            self.asr_model.decoder.prepare_search()
        limit_length(self)

    @classmethod
    def from_pretrained(cls, model_tag: str | None = None, **options: Any) -> "Speech2Text":
        """Build it from a zip or a tag of espnet_model_zoo, or from files as the constructor does.

        Raises:
            UserError: see `espnet_kv.espnet.packs.unpacked` and the class.
        """
        if model_tag is not None:
            options |= unpacked(model_tag)
        return cls(**options)

    def __call__(self, speech: Any) -> Any:
        """N-best results of (N,) samples, or a list of them for a list of samples.

        What is longer than the window of a Whisper encoder is decoded in parts; see
        `espnet_kv.espnet.long_audio`.

        Raises:
            TooShortUttError: there are fewer samples than the first frame needs.
        """
        if isinstance(speech, list | tuple):
            return self.batch_decode(speech)
        _check_length(self.asr_model, [len(speech)])
        if len(speech) <= (most := most_samples(self.asr_model)):
            return super().__call__(speech)
        parts = windows(torch.as_tensor(speech), most)
        return joined(list(map(super().__call__, parts)))

    def _hyps_to_results(self, nbest_hyps: list) -> list:
        """ESPnet's n-best list; a text has one line, because files of texts have one for each."""
        return [
            (text if not text or text.splitlines() == [text] else " ".join(text.split()), *rest)
            for text, *rest in super()._hyps_to_results(nbest_hyps)
        ]

    def batch_decode(self, speech: Any, speech_lengths: Any = None) -> Any:
        """N-best results of each of (B, N) samples.

        Raises:
            TooShortUttError: as `__call__`.
        """
        if isinstance(speech, list | tuple):
            speech_lengths = None  # as ESPnet's
        elif speech_lengths is None:
            return super().batch_decode(speech)  # which refuses it
        lengths = list(map(len, speech)) if speech_lengths is None else speech_lengths
        _check_length(self.asr_model, [int(length) for length in lengths])
        if max(lengths) <= (most := most_samples(self.asr_model)):
            return super().batch_decode(speech, speech_lengths)
        parts = [
            windows(torch.as_tensor(samples)[: int(length)], most)
            for samples, length in zip(speech, lengths, strict=True)
        ]
        found: list[Any] = []
        for batch in batched(chain.from_iterable(parts), len(parts)):
            found += super().batch_decode(list(batch))
        results = iter(found)
        return [joined(list(islice(results, len(own)))) for own in parts]


def search_task(kv_decoder: bool, partial_ar: bool = False) -> type[ASRTask]:
    """The task that loads a model for a search.

    Args:
        partial_ar: a search of another kind, which keeps the stock decoder.
    """
    return CachedDecodingTask if kv_decoder and not partial_ar else ASRTask


def language_model_task(espnet_task: Any, cached: bool) -> Any:
    """Subclass ESPnet's LMTask with strict loading, as in our ASRTask.

    ESPnet silently leaves missing parameters at their random initialisation.

    Args:
        cached: build kv_transformer in place of ESPnet's `transformer`.
    """

    class LanguageModelTask(espnet_task):
        @classmethod
        def build_model(cls, args: Any) -> Any:
            vars(args).update(plain_names(vars(args)))
            if cached and args.lm == "transformer":
                args.lm = "kv_transformer"
            model = super().build_model(args)
            if isinstance(model.lm, KVTransformerLM):
                model.lm.load_guard.remove()  # the guard of the whole model names all keys at once
            refuse_partial_loads(model)
            return model

        @classmethod
        def build_model_from_file(cls, config_file: Any, model_file: Any, device: str) -> Any:
            """Build a trained language model.

            Raises:
                UserError: a file is missing, damaged or of another kind, or they do not match.
            """
            read_config(config_file, keys=("lm", "token_list"))
            read_checkpoint(model_file)
            try:
                model, args = super().build_model_from_file(config_file, model_file, device)
            except (UserError, TypeError, KeyError, ValueError, AttributeError) as error:
                raise UserError(f"{config_file}, {model_file}: {one_line(error)}") from error
            except RuntimeError as error:
                if "loading state_dict" in str(error):
                    raise UserError(f"{model_file}: {one_line(error)}") from error
                raise
            check_finite(model, model_file)
            if isinstance(model.lm, KVTransformerLM):
                model.lm.prepare_search()
            cls.tokens = args.token_list
            return model, args

    return LanguageModelTask


def too_short_result(nbest: int, enh_s2t_task: bool, speech2text: Any) -> list:
    """The n-best list of an utterance that is too short: empty texts, as in streaming."""
    hypothesis = Hypothesis(score=0.0, scores={}, states={}, yseq=[])
    text = None if speech2text.tokenizer is None else ""
    results: list = [(text, [], [], hypothesis)] * nbest
    if enh_s2t_task:
        return [results] * getattr(speech2text.asr_model.enh_model, "num_spk", 1)
    return results


def _check(given: Mapping[str, Any]) -> None:
    """Refuse arguments that ESPnet would ignore, or reject long after the start."""
    check_search(argparse.Namespace(**given))
    for name, other in PAIRS:
        if given[name] is not None and given[other] is None:
            raise ArgumentError(name, f"needs {other}")
    for name in given["quantize_modules"]:
        if not hasattr(nn, name):
            message = f"{name}: torch.nn has no such class; e.g. Linear"
            raise ArgumentError("quantize_modules", message)


def limit_length(speech2text: espnet.Speech2Text) -> None:
    """End hypotheses when the decoder has no more positions, where their number is limited."""
    search = speech2text.beam_search
    positions = getattr(speech2text.asr_model.decoder, "text_positions", None)
    if positions is None or not hasattr(search, "post_process"):
        return
    own = search.post_process
    said: list[bool] = []

    def post_process(i: int, maxlen: Any, *rest: Any) -> Any:
        most = positions - search._primer_length() + 1  # <eos> needs no position
        wanted = maxlen if isinstance(maxlen, list) else [maxlen]
        if i == most - 1 and max(wanted) > most and not said:
            said.append(True)
            logging.warning(
                f"a hypothesis has {positions} tokens, the most that the decoder has positions "
                "for: hypotheses end there"
            )
        least = [min(count, most) for count in wanted]
        return own(i, least if isinstance(maxlen, list) else least[0], *rest)

    search.post_process = post_process


def _encode_apart(model: Any, speech: Tensor, speech_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """ESPnet's `encode`, (B, T, D) and (B,), for each utterance alone if their lengths differ."""
    encode = type(model).encode
    if len(set(speech_lengths.tolist())) == 1:
        return encode(model, speech, speech_lengths)
    utterances = zip(speech, speech_lengths, strict=True)
    encoded = [encode(model, one[None, :length], length[None]) for one, length in utterances]
    frames, lengths = zip(*encoded, strict=True)
    return pad_sequence([one[0] for one in frames], batch_first=True), torch.cat(lengths)


def _check_length(model: nn.Module, lengths: list[int]) -> None:
    frontend, least = getattr(model, "frontend", None), 1
    if isinstance(frontend, DefaultFrontend) and frontend.stft is not None:
        stft = frontend.stft
        least = stft.n_fft // 2 + 1 if stft.center else stft.n_fft
    elif isinstance(model.encoder, OpenAIWhisperEncoder):
        least = model.encoder.n_fft // 2 + 1
    if min(lengths) < least:
        raise TooShortUttError(
            f"{min(lengths)} samples of audio are too few: features need at least {least}; its "
            "text is left empty",
            min(lengths),
            least,
        )


def _features_in_32_bits(model: Any, dtype: torch.dtype) -> None:
    """Compute features in float32, because a power spectrum exceeds the range of 16 bits."""
    for module in (model.frontend, model.normalize):
        if module is not None:
            module.float()

    if isinstance(model.encoder, OpenAIWhisperEncoder):
        return  # it computes features itself

    def narrow(module: nn.Module, inputs: tuple) -> tuple:
        features, *rest = inputs
        return features.to(dtype) if isinstance(features, Tensor) else features, *rest

    first = model.encoder if getattr(model, "preencoder", None) is None else model.preencoder
    first.register_forward_pre_hook(narrow)
