"""ESPnet3's ASR system with a stage that profiles the trained model."""

import copy
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import yaml
from espnet3.contract.stages import StageSpec
from espnet3.systems.esp2_asr.system import ASRSystem
from omegaconf import OmegaConf

from espnet_kv.bin import profile
from espnet_kv.errors import UserError, one_line
from espnet_kv.files import write_text
from espnet_kv.profile.schema import read_profiles
from espnet_kv.report.write import TITLE, write_report

from .fresh import renew_results, renew_statistics
from .plain import plainly

SEARCH = ("beam_size", "ctc_weight", "penalty", "maxlenratio", "minlenratio")
"""Arguments of Speech2Text that the profile's search takes, too."""


def _with_profile(stages: tuple[StageSpec, ...]) -> tuple[StageSpec, ...]:
    place = [stage.name for stage in stages].index("measure") + 1
    ours = StageSpec(name="profile", config=("metrics", "inference"), log_dir="inference_dir")
    return (*stages[:place], ours, *stages[place:])


class KVSystem(ASRSystem):
    """ASRSystem with a `profile` stage after `measure`; what a user can mend is one line."""

    stages: ClassVar[tuple[StageSpec, ...]] = _with_profile(ASRSystem.stages)

    create_dataset = plainly(ASRSystem.create_dataset)
    measure = plainly(ASRSystem.measure)
    pack_model = plainly(ASRSystem.pack_model)
    pack_demo = plainly(ASRSystem.pack_demo)

    @plainly
    def train_tokenizer(self, *args: Any, **kwargs: Any) -> None:
        """Train the tokenizer, also where an earlier run was interrupted."""
        if not self._has_tokenizer():  # ESPnet3 refuses to write its text a second time
            (Path(self.training_config.data_dir) / "train_tokenizer/train.txt").unlink(
                missing_ok=True
            )
        super().train_tokenizer(*args, **kwargs)

    @plainly
    def collect_stats(self, *args: Any, **kwargs: Any) -> None:
        """Collect statistics, anew where they were of something else."""
        config = self.training_config
        if not Path(config.model.token_list).is_file():
            raise UserError(
                f"{config.model.token_list} does not exist: run the train_tokenizer stage"
            )
        renew_statistics(config)
        # ESPnet3 takes `normalize` out of what it is given, and `train` may follow in this process
        self.training_config = copy.deepcopy(config)
        try:
            super().collect_stats(*args, **kwargs)
        finally:
            self.training_config = config

    @plainly
    def train(self, *args: Any, **kwargs: Any) -> None:
        """Train, or go on with a training that was interrupted.

        Raises:
            UserError: it was a training of another model.
        """
        try:
            super().train(*args, **kwargs)
        except (RuntimeError, UserError) as error:
            if not any(text in str(error) for text in ("loading state_dict", "does not fit")):
                raise
            raise UserError(
                f"{self.exp_dir}/last.ckpt is of another model: remove {self.exp_dir}, or copy the "
                f"configuration to a file of another name: {one_line(error)}"
            ) from error

    @plainly
    def infer(self, *args: Any, **kwargs: Any) -> None:
        """Decode the test sets, anew where results are of another model or search."""
        renew_results(self.inference_config)
        super().infer(*args, **kwargs)

    @plainly
    def profile(self, *args: Any, **kwargs: Any) -> None:
        """Measure cache bytes, latency and memory of the trained model, and compare all models.

        EXP_DIR/profile/profile.json is written and, in the directory that holds EXP_DIR, the table
        of all models that were profiled: RESULTS.md.

        Raises:
            UserError: a model, a test set or an option cannot be used.
        """
        self._reject_stage_args("profile", args, kwargs)
        model = self.inference_config.model
        exp_dir, inference_dir = (
            Path(self.metrics_config[key]) for key in ("exp_dir", "inference_dir")
        )
        output = exp_dir / "profile" / "profile.json"
        search = output.with_name("search.yaml")
        write_text(search, yaml.safe_dump({key: model[key] for key in SEARCH if key in model}))
        # one file for all models: figures compare where the audio is the same
        recordings = Path(self.inference_config.data_dir) / "profile.scp"
        write_text(recordings, self._recordings())
        options = {
            "asr_train_config": model.asr_train_config,
            "asr_model_file": model.asr_model_file,
            "inference_config": search,
            "wav_scp": recordings,
            "output": output,
            **OmegaConf.to_container(self.metrics_config.get("profile") or OmegaConf.create({})),
        }
        words = [word for name, value in options.items() for word in _words(name, value)]
        if status := profile.main(words):  # it has said what is wrong
            raise SystemExit(status)
        document = json.loads(output.read_text(encoding="utf-8"))
        document["wer"]["offline"] = _rates(inference_dir)
        write_text(output, json.dumps(document, indent=1) + "\n")
        _write_report(exp_dir.parent)

    def _recordings(self) -> str:
        """The utterances of the test sets, as a wav.scp."""
        lines = []
        for test_set in self.inference_config.dataset.test:
            manifest = Path(test_set.data_src_args.manifest)
            if not manifest.is_file():
                raise UserError(f"{manifest} does not exist: run the create_dataset stage")
            for line in manifest.read_text(encoding="utf-8").splitlines():
                utterance, audio, _ = line.split("\t")
                lines.append(f"{test_set.name}-{utterance} {audio}\n")
        return "".join(lines)

    @plainly
    def upload_model(self, *args: Any, **kwargs: Any) -> None:
        """Upload the packed model.

        Raises:
            UserError: nobody is logged in to Hugging Face, or it cannot be reached.
        """
        with _uploading():
            super().upload_model(*args, **kwargs)

    @plainly
    def upload_demo(self, *args: Any, **kwargs: Any) -> None:
        """Upload the packed demo; see `upload_model`."""
        with _uploading():
            super().upload_demo(*args, **kwargs)


@contextmanager
def _uploading() -> Iterator[None]:
    if huggingface_hub.get_token() is None:
        raise UserError("no token of Hugging Face was found: run `hf auth login`, or set HF_TOKEN")
    try:
        yield
    except Exception as error:  # of any of the libraries below, e.g. without a network
        raise UserError(f"the upload failed: {one_line(error)}") from error


def _words(name: str, value: Any) -> list[str]:
    """An option as it stands on a command line."""
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]


def _write_report(experiments: Path) -> None:
    """Write tables, figures and a page of all profiled models, and print the table."""
    profiles = read_profiles(sorted(experiments.glob("*/profile/profile.json")))
    command = shlex.join(["python", *sys.argv])
    results = experiments / "RESULTS.md"
    print(write_report(profiles, experiments / "report", results, TITLE, command), flush=True)


def _rates(inference_dir: Path) -> dict[str, dict[str, Any]]:
    """Test set -> {"wer", "cer", "decoding"} of the metrics.json that `measure` wrote."""
    file = inference_dir / "metrics.json"
    if not file.is_file():
        return {}
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged: run the measure stage again") from error
    rates: dict[str, dict[str, Any]] = {}
    for sets in metrics.values():
        for name, result in sets.items():
            found = {key.lower(): value for key, value in result.items() if key in ("WER", "CER")}
            rates.setdefault(name, {"decoding": inference_dir.name}).update(found)
    return {name: row for name, row in rates.items() if "wer" in row}
