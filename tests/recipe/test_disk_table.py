"""The dictionary on disk, and the memory of the stages that use it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from espnet_kv.errors import UserError
from espnet_kv.recipe.datadir import DataDir
from espnet_kv.recipe.disk_table import Table

REPO = Path(__file__).parents[2]
KEYS = st.text(st.characters(codec="utf-8"), max_size=5)


@given(st.lists(st.tuples(KEYS, st.one_of(st.none(), st.integers()))))
def test_a_table_is_a_sorted_dictionary(pairs):
    table, expected = Table[int | None](), dict(pairs)
    for key, value in pairs:
        table[key] = value
    assert list(table.items()) == sorted(expected.items())
    assert list(table) == sorted(expected) and len(table) == len(expected)
    for key in expected:
        assert key in table and table[key] == expected[key]
        del table[key]
        assert key not in table and table.get(key, 7) == 7
        with pytest.raises(KeyError):
            del table[key]
    assert not table


def test_a_full_disk_is_told_with_the_way_out():
    table = Table[str]()
    table._execute("PRAGMA max_page_count = 3")
    with pytest.raises(UserError, match=r"on disk \(.*disk is full\): set TMPDIR"):
        table["key"] = "x" * 100_000


def test_a_data_directory_on_disk_writes_the_files_of_one_in_memory(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "wav.scp").write_text("r2 /b.wav\nr1 /a.wav\nr3 /a-b/c.wav\n")
    (source / "segments").write_text("s2-u4 r1 1.5 -1\ns1-u1 r1 0 1.5\ns1-u3 r3 0 -1\nr2 r2 0 -1\n")
    (source / "text").write_text("s2-u4 FOUR\ns1-u1\ns1-u3 THREE  WORDS\nr2 TWO\n")
    (source / "utt2spk").write_text("s2-u4 s2\ns1-u1 s1\ns1-u3 s1\nr2 s2\n")
    for on_disk in (False, True):
        data = DataDir.read(source, on_disk=on_disk)
        assert list(data.recordings()) == [
            ("/b.wav", ["r2"]),
            ("/a.wav", ["s1-u1", "s2-u4"]),
            ("/a-b/c.wav", ["s1-u3"]),
        ]
        clean, dropped = data.check("set")
        assert dict(dropped) == {"s1-u1": "empty transcript"}
        clean.write(tmp_path / str(on_disk))
    for name in ("wav.scp", "segments", "text", "utt2spk", "spk2utt"):
        written = (tmp_path / "True" / name).read_text()
        assert written == (tmp_path / "False" / name).read_text()
    assert (tmp_path / "True/spk2utt").read_text() == "s1 s1-u3\ns2 r2 s2-u4\n"


MEASURE = r"""
import re, sys
from espnet_kv.recipe import disk_table
disk_table.CACHE = 20
from pathlib import Path
from espnet_kv.recipe.content import Content
from espnet_kv.recipe.format import format_audio
from espnet_kv.recipe.lengths import filter_lengths
from espnet_kv.recipe.perturb import perturb_speed

def kilobytes(name):
    # getrusage knows the largest of the process before exec, too
    return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])

def main():
    data, before = Path(sys.argv[1]), kilobytes("VmRSS")
    Content(data / "hashes").of_audio(data / "train")
    perturb_speed(data / "train", data / "train_sp", [1.0], 2)
    format_audio(data / "train_sp", data / "org", nj=2)
    filter_lengths(data / "org", data / "dump", 0, 30, shortest_seconds=0.001)
    print(kilobytes("VmHWM") - before)

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_utterances(tmp_path):
    (tmp_path / "run.py").write_text(MEASURE)
    soundfile.write(tmp_path / "a.wav", np.zeros(160), 16000, subtype="PCM_16")
    kilobytes = []
    for number in (1000, 5000):
        train = tmp_path / str(number) / "train"
        train.mkdir(parents=True)
        audio = [train / f"{n:06d}-of-some-speaker.wav" for n in range(number)]
        for path in audio:
            path.hardlink_to(tmp_path / "a.wav")
        speakers = [f"speaker{n // 50}" for n in range(number)]
        values = {"wav.scp": audio, "text": ["A B"] * number, "utt2spk": speakers}
        for name, column in values.items():
            lines = (f"some-speaker-{n:06d} {value}\n" for n, value in enumerate(column))
            (train / name).write_text("".join(lines))
        ended = subprocess.run(
            [sys.executable, tmp_path / "run.py", train.parent],
            env={"PYTHONPATH": str(REPO), "PATH": "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        kilobytes.append(int(ended.stdout.splitlines()[-1]))
    growth = (kilobytes[1] - kilobytes[0]) / 4000
    print(kilobytes)
    # allocators and threads make differences of a megabyte; the tables alone would be 16
    assert growth < 1, f"{growth} kB for each utterance: {kilobytes}"
