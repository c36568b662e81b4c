"""Converts the attention of a loaded model and measures errors and cache size."""

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from espnet_kv.attention import ATTENTIONS
from espnet_kv.attention.latent import MultiHeadLatentAttention
from espnet_kv.convert.calibration import Calibration, CalibrationRunner, start_tokens
from espnet_kv.convert.calls import Call, recording
from espnet_kv.convert.choice import Choice, ModelError, candidates, choose_mla
from espnet_kv.convert.factorize import to_mla, to_shared_mla
from espnet_kv.convert.layer_error import layer_errors
from espnet_kv.convert.linalg import symmetric_root
from espnet_kv.convert.measure import cache_bytes
from espnet_kv.convert.modules import plain_attention, put_in_place, replacement_module
from espnet_kv.convert.pooling import to_gqa
from espnet_kv.convert.source import PARTS
from espnet_kv.convert.statistics import LayerStatistics
from espnet_kv.convert.target import Target, layer_options
from espnet_kv.convert.transfer import to_linear, transfer
from espnet_kv.decoder.cached import SHARED
from espnet_kv.errors import ArgumentError, UserError
from espnet_kv.espnet.loading import build_filled
from espnet_kv.espnet.task import ASRTask
from espnet_kv.espnet.whisper_weights import weights_follow

# attention transfer: utterances in one training step
UTTERANCES = 4

type Progress = Callable[[str, int], Callable[[], object]]
"""progress("label", total) -> a function to be called after each of `total` steps."""


@dataclass
class Layer:
    """One converted attention layer.

    part: key of PARTS. name: name of the module in the model. conf: options of its attention type.
    spectrum: singular values of [W_k; W_v], with audio weighted by the square root of the frame
        covariance, in descending order, normalised to a sum of squares of 1.
    errors: relative errors of k, v and output on held-out audio; None without audio.
    """

    part: str
    name: str
    conf: dict[str, Any]
    spectrum: list[float]
    errors: dict[str, float] | None = None


@dataclass
class Conversion:
    """A converted model.

    config: its training configuration.
    cache: part -> {"before": ..., "after": ...}, results of `cache_bytes`.
    choices: part -> {"chosen": candidate, "errors": {candidate: error of the model}}, see
        `choose_mla`; empty for other attention types and without audio.
    """

    model: Any
    config: dict[str, Any]
    layers: list[Layer] = field(default_factory=list)
    cache: dict[str, dict[str, Any]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)


def convert_model(
    model: Any,
    config: Mapping[str, Any],
    parts: Sequence[str],
    target: Target,
    calibration: Calibration | None,
    progress: Progress,
) -> Conversion:
    """Convert the attention of the given parts of a model; the rest is not changed.

    Args:
        model, config: from `load_source`. The attention modules of `model` are replaced in place.
        parts: keys of PARTS.
        calibration: audio to fit to; None: fit to the weights only.
        progress: reports the progress.

    Raises:
        UserError: a layer cannot be converted to `target`.
    """
    if target.attention_type == "linear" and calibration is None:
        raise ArgumentError("attention_type", "linear is trained on audio: give calibration_scp")
    parameters = {"before": _count(model)}
    cache = {part: {"before": cache_bytes(model, part)} for part in parts}
    names = {part: PARTS[part].attentions(model) for part in parts}
    modules = {name: a for attentions in names.values() for name, a in attentions.items()}
    names = {
        part: {name: plain_attention(a) for name, a in attentions.items()}
        for part, attentions in names.items()
    }
    sources = {name: a for attentions in names.values() for name, a in attentions.items()}
    if target.attention_type == "linear" and any(sources[n] is not modules[n] for n in modules):
        raise ArgumentError("attention_type", "linear: Whisper models become mla or gqa only")
    options = {part: layer_options(target, attentions) for part, attentions in names.items()}
    for part, attentions in names.items():
        for name, attention in attentions.items():
            with named(name):  # raises what cannot be done, before the model runs
                replacement_module(attention, ATTENTIONS[target.attention_type], **options[part])
    fit_calls: dict[str, list[Call]] = {}
    held_out_calls: dict[str, list[Call]] = {}
    runner = None
    if calibration is not None:
        sides = sorted({PARTS[part].module for part in parts})  # only these have to run
        decoding = "decoder" in sides
        start = start_tokens(model, config) if decoding else ()
        runner = CalibrationRunner(model, decoding, start)
        audio = [*calibration.fit, *calibration.held_out]
        runner.transcribe(audio, progress("greedy search", len(audio)))
        step = progress("calibration", len(audio))
        with recording(modules) as fit_calls:
            runner.backward(calibration.fit, step, sides)
        with recording(modules) as held_out_calls:
            runner.run(calibration.held_out, step, sides)
    step = progress("statistics", len(sources))
    statistics: dict[str, LayerStatistics] = {}
    for name, calls in fit_calls.items():
        statistics[name] = LayerStatistics.of(sources[name], calls)
        step()

    layers = []
    choices = {}
    new_config = copy.deepcopy(dict(config))
    converted: dict[str, Any] = {}
    for part, attentions in names.items():
        conf = options[part]
        confs = dict.fromkeys(attentions, conf)
        if target.attention_type == "mla" and calibration is not None and runner is not None:
            known = {name: (attention, statistics[name]) for name, attention in attentions.items()}
            choice = _choose(model, part, known, target, runner, calibration, progress)
            converted |= choice.modules
            choices[part] = {"chosen": choice.chosen, "errors": choice.errors}
        elif (rank := target.shared_rank(PARTS[part], attentions)) is not None:
            step = progress(f"{part} to one latent", 1)
            made = to_shared_mla(list(attentions.values()), rank)
            converted |= dict(zip(attentions, made, strict=True))
            step()
        else:
            step = progress(f"{part} to {target.attention_type}", len(attentions))
            for name, attention in attentions.items():
                converted[name] = _convert_layer(
                    name, attention, target, conf, statistics.get(name)
                )
                step()
        if target.attention_type == "mla":
            confs = {name: _mla_options(converted[name]) for name in attentions}
        for name, attention in attentions.items():
            spectrum = _spectrum(attention, statistics.get(name))
            layers.append(Layer(part, name, confs[name], spectrum))
        _set_options(new_config, part, model, target.attention_type, confs)
    if target.attention_type == "linear":
        assert calibration is not None and runner is not None
        _train_linear(sources, converted, target, calibration.fit, runner, progress)
    if held_out_calls:
        step = progress("errors on held-out audio", len(layers))
        for layer in layers:
            name = layer.name
            layer.errors = layer_errors(sources[name], converted[name], held_out_calls[name])
            step()

    for part in parts:
        put_in_place(PARTS[part].slots(model), converted)
    # rebuilt from the configuration, to check that it describes all the weights
    args = argparse.Namespace(**copy.deepcopy(new_config))
    with weights_follow():
        rebuilt: Any = build_filled(
            ASRTask.build_model,
            args,
            model.state_dict(),
            "the configuration of the converted model",
        )
    rebuilt.load_state_dict(model.state_dict())
    rebuilt.eval()
    for part in parts:
        cache[part]["after"] = cache_bytes(rebuilt, part)
    parameters["after"] = _count(rebuilt)
    return Conversion(rebuilt, new_config, layers, cache, parameters, choices)


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _choose(
    model: Any,
    part: str,
    layers: Mapping[str, tuple[Any, LayerStatistics]],
    target: Target,
    runner: CalibrationRunner,
    calibration: Calibration,
    progress: Progress,
) -> Choice:
    """`choose_mla` for a part of the model."""
    attentions = {name: attention for name, (attention, _) in layers.items()}
    rank = layer_options(target, attentions)["kv_rank"]
    budget = target.budget(attentions)
    where = PARTS[part]
    shared = target.shared_rank(where, attentions)

    def run() -> Tensor:
        return runner.run(calibration.held_out, modules=[where.module])[where.module]

    size = next(iter(attentions.values())).n_feat
    step = progress(f"{part} to mla", len(layers) * candidates(budget, shared, size))
    return choose_mla(layers, rank, budget, ModelError(model, where, run).of, step, shared)


def _mla_options(module: MultiHeadLatentAttention) -> dict[str, Any]:
    """attention_conf of a converted module."""
    return {"kv_rank": module.kv_rank} | ({SHARED: True} if module.shares_state else {})


def _convert_layer(
    name: str,
    attention: Any,
    target: Target,
    conf: dict[str, Any],
    statistics: LayerStatistics | None,
) -> Any:
    with named(name):
        if target.attention_type == "mla":
            return to_mla(attention, conf["kv_rank"], statistics)
        if target.attention_type == "gqa":
            return to_gqa(attention, conf["num_kv_heads"], statistics)
        return to_linear(attention, conf["feature_map"])


@contextmanager
def named(layer: str) -> Iterator[None]:
    """Context manager within which UserErrors begin with the name of a layer."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{layer}: {error}") from error


def _spectrum(attention: Any, statistics: LayerStatistics | None) -> list[float]:
    stacked = torch.cat([attention.linear_k.weight, attention.linear_v.weight]).detach().double()
    if statistics is not None:
        stacked = stacked @ symmetric_root(statistics.covariance)
    values = torch.linalg.svdvals(stacked)
    return (values / values.norm().clamp(min=1e-300)).tolist()


def _set_options(
    config: dict[str, Any], part: str, model: Any, kind: str, confs: Mapping[str, dict[str, Any]]
) -> None:
    """Set attention_type and attention_conf of a part; one value if all layers have the same."""
    where = PARTS[part]
    of_block = {id(block): confs[name] for name, block, _ in where.slots(model)}
    first: dict[str, Any] = next(iter(confs.values()))
    # any for a block without attention
    rows = [of_block.get(id(block), first) for block in where.blocks(model)]
    options: dict[str, Any] = {}
    for key in first:
        values = [row[key] for row in rows]
        options[key] = values[0] if len(set(values)) == 1 else values
    conf = dict(config.get(f"{where.module}_conf") or {})
    conf |= {where.type_key: kind, where.conf_key: options}
    config[f"{where.module}_conf"] = conf


def _train_linear(
    teachers: Mapping[str, Any],
    students: Mapping[str, Any],
    target: Target,
    audio: Sequence[Tensor],
    runner: CalibrationRunner,
    progress: Progress,
) -> None:
    """Train linear attention by attention transfer, in repeated passes over the audio."""
    step = progress("attention transfer", target.transfer_steps)
    utterances = itertools.cycle(audio)

    def run() -> None:
        runner.run([next(utterances) for _ in range(UTTERANCES)])

    trainable = any(list(student.feature_map.parameters()) for student in students.values())
    transfer(
        teachers,
        students,
        run,
        target.transfer_steps,
        projections=not trainable,
        progress=lambda *_: step(),
    )
