"""ESPnet's offline inference with our classes, replaced within a context.

ESPnet's Speech2Text fails with a traceback for audio that is too short, models of 16 bits and beams
larger than the vocabulary. The subclass here handles these cases.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from espnet2.asr.frontend.default import DefaultFrontend
from espnet2.bin.asr_inference import Hypothesis, TooShortUttError
from torch import Tensor, nn

from espnet_kv.errors import ArgumentError, UserError, one_line
from espnet_kv.espnet.ctc_prefix import FastCTCPrefixScorer, WideCTCPrefixScorer
from espnet_kv.espnet.loading import (
    check_finite,
    load_tokenizer,
    read_checkpoint,
    read_config,
    refuse_partial_loads,
)


@contextmanager
def replaced(module: Any, **ours: Any) -> Iterator[None]:
    """Replace attributes of an ESPnet module within the block."""
    own = {name: getattr(module, name) for name in ours}
    vars(module).update(ours)
    try:
        yield
    finally:
        vars(module).update(own)


@contextmanager
def our_inference(task: Any, fast_ctc: bool) -> Iterator[Any]:
    """Yield `espnet2.bin.asr_inference` with our classes in place of ESPnet's.

    Args:
        task: task that builds the ASR model.
        fast_ctc: compute CTC prefix scores of all frames at once.
    """
    from espnet2.bin import asr_inference as espnet

    lm_task = language_model_task(espnet.LMTask)
    with replaced(
        espnet,
        ASRTask=task,
        LMTask=lm_task,
        CTCPrefixScorer=FastCTCPrefixScorer if fast_ctc else WideCTCPrefixScorer,
        Speech2Text=speech2text(espnet.Speech2Text, lm_task),
        _too_short_result=too_short_result,
    ):
        yield espnet


def speech2text(espnet_class: Any, lm_task: Any) -> Any:
    """Subclass ESPnet's Speech2Text with checks, 16-bit models and `prepare_search`.

    Args:
        lm_task: class from `language_model_task` that loads the language model.
    """

    class Speech2Text(espnet_class):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            lm_tokens = getattr(lm_task, "tokens", None)  # None: no language model
            if lm_tokens is not None and list(lm_tokens) != list(self.asr_model.token_list):
                raise ArgumentError(
                    "lm_train_config",
                    f"{options['lm_train_config']}: its token_list is not that "
                    "of the ASR model; give a language model of the same tokens",
                )
            names = (options.get(name) for name in ("token_type", "bpemodel"))
            load_tokenizer(self.asr_train_args, *names)  # ESPnet would fail at the first text
            tokens, beam = len(self.asr_model.token_list), options.get("beam_size", 1)
            if beam > tokens:
                raise ArgumentError(
                    "beam_size",
                    f"{beam} is more than the {tokens} tokens of the model; give a smaller one",
                )
            if (dtype := options.get("dtype")) in ("float16", "bfloat16"):
                _features_in_32_bits(self.asr_model, getattr(torch, dtype))
                self.dtype = "float32"  # type of the audio
            if hasattr(self.asr_model.decoder, "prepare_search"):
                self.asr_model.decoder.prepare_search()

        def __call__(self, speech: Any) -> Any:
            """N-best results of (N,) samples.

            Raises:
                TooShortUttError: the audio is shorter than the first frame.
            """
            if not isinstance(speech, list | tuple):
                _check_length(self.asr_model, [len(speech)])
            return super().__call__(speech)

        def batch_decode(self, speech: Any, speech_lengths: Any = None) -> Any:
            """N-best results of each of (B, N) samples.

            Raises:
                TooShortUttError: as `__call__`.
            """
            lengths = list(map(len, speech)) if speech_lengths is None else speech_lengths
            _check_length(self.asr_model, [int(length) for length in lengths])
            return super().batch_decode(speech, speech_lengths)

    return Speech2Text


def language_model_task(espnet_task: Any) -> Any:
    """Subclass ESPnet's LMTask with strict loading, as in our ASRTask.

    ESPnet silently leaves missing parameters at their random initialisation.
    """

    class LanguageModelTask(espnet_task):
        @classmethod
        def build_model(cls, args: Any) -> Any:
            model = super().build_model(args)
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


def _check_length(model: nn.Module, lengths: list[int]) -> None:
    frontend, least = getattr(model, "frontend", None), 1
    if isinstance(frontend, DefaultFrontend) and frontend.stft is not None:
        stft = frontend.stft
        least = stft.n_fft // 2 + 1 if stft.center else stft.n_fft
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

    def narrow(module: nn.Module, inputs: tuple) -> tuple:
        features, *rest = inputs
        return features.to(dtype) if isinstance(features, Tensor) else features, *rest

    first = model.encoder if getattr(model, "preencoder", None) is None else model.preencoder
    first.register_forward_pre_hook(narrow)
