"""Damaged and hostile config.json files: one of our exceptions, quickly, whatever is in them."""

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from config_cases import COMPLETE, write_config
from hypothesis import given
from hypothesis import strategies as st

from nemotron_h import NemotronHConfig, family
from nemotron_h.errors import CheckpointError, ConfigError

SMALL = '{"model_type": "nemotron_h", "hidden_size": 64, "hybrid_override_pattern": "M*"}'
HOSTILE = {
    "deep list": "[" * 100_000,
    "deep list closed": "[" * 100_000 + "]" * 100_000,
    "deep value": '{"hidden_size": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep objects": '{"a": ' * 100_000 + "1" + "}" * 100_000,
    "list": "[]",
    "list of a config": f"[{SMALL}]",
    "number": "5",
    "string": '"nemotron_h"',
    "null": "null",
    "infinity": "Infinity",
    "duplicate key": '{"hidden_size": 64, "hidden_size": 128}',
    "duplicate key, equal": '{"hidden_size": 64, "hidden_size": 64}',
    "duplicate key inside": '{"block_configs": [{"block_type": "moe", "block_type": "mlp"}]}',
    "empty": "",
    "blank": " \n",
    "truncated": SMALL[:-1],
    "trailing text": SMALL + "}",
    "two objects": SMALL + SMALL,
    "single quotes": SMALL.replace('"', "'"),
    "binary": bytes(range(256)),
    "zeros": bytes(1000),
    "not UTF-8": b'{"note": "\xff\xfe"}',
    "UTF-16": SMALL.encode("utf-16"),
    "byte-order mark": b"\xef\xbb\xbf" + SMALL.encode(),
    "half a surrogate": '{"note": "\\ud800"}',
    "control character": '{"note": "\x01"}',
    "integer of 5000 digits": '{"hidden_size": ' + "9" * 5000 + "}",
    "NaN": '{"layer_norm_epsilon": NaN}',
    "other model": '{"model_type": "llama", "hidden_size": 64}',
    "other nested": '{"model_type": "vit", "text_config": {"model_type": "llama"}}',
    "pattern": '{"hybrid_override_pattern": "M*X"}',
    "key is empty and bad": '{"": 1, "hidden_size": -1}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    content = HOSTILE[name]
    directory = write_config(tmp_path, content)
    start = time.perf_counter()
    for source in (directory, directory / "config.json"):
        with pytest.raises((ConfigError, CheckpointError)) as error:
            NemotronHConfig.from_pretrained(source)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500 + len(str(tmp_path))
    with pytest.raises((ConfigError, CheckpointError)):
        NemotronHConfig.from_json_file(directory / "config.json")
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("content", [SMALL, SMALL + "\n", "{}", '{"time_step_limit": [0.0, Infinity]}'])
def test_sound_file_is_read(content: str, tmp_path: Path) -> None:
    expected = NemotronHConfig(**json.loads(content))
    assert NemotronHConfig.from_pretrained(write_config(tmp_path, content)) == expected
    assert NemotronHConfig.from_json_file(tmp_path / "config.json") == expected


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for length in range(len(SMALL)):
        write_config(tmp_path, SMALL[:length])
        with pytest.raises((ConfigError, CheckpointError)):
            NemotronHConfig.from_pretrained(tmp_path)


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_changed_bytes_raise_only_our_errors(
    tmp_path_factory: pytest.TempPathFactory, place: int, change: bytes
) -> None:
    original = COMPLETE[-1].read_bytes()
    place %= len(original)
    directory = tmp_path_factory.mktemp("changed")
    write_config(directory, original[:place] + change + original[place + len(change) :])
    try:
        config = NemotronHConfig.from_pretrained(directory)
    except (ConfigError, CheckpointError):
        return
    config.validate()


def test_values_are_validated_with_overrides(tmp_path: Path) -> None:
    write_config(tmp_path, SMALL)
    with pytest.raises(ConfigError, match="hidden_size=-5"):
        NemotronHConfig.from_pretrained(tmp_path, hidden_size=-5)
    with pytest.raises(ConfigError, match="mamba_n_groups=3"):
        NemotronHConfig.from_pretrained(tmp_path, n_groups=3)
    config, unused = NemotronHConfig.from_pretrained(
        tmp_path, hidden_size=32, return_unused_kwargs=True, device_map="cpu", trust_remote_code=True
    )
    assert config.hidden_size == 32
    assert unused == {"device_map": "cpu"}


def test_huge_sizes_are_counted_at_once() -> None:
    """A million layers of width 2^20 are legal; arithmetic answers, with the list of layers as the only memory."""
    script = """
        import resource, time
        from nemotron_h import family

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

        family.count(family.describe({}))
        before, start = peak(), time.perf_counter()
        config = family.describe({"hidden_size": 2**20, "hybrid_override_pattern": "ME*-" * 250_000})
        print(family.count(config).total, family.cache_bytes(config).per_token)
        print(peak() - before, time.perf_counter() - start)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    counted, measured = result.stdout.splitlines()
    one = family.describe({"hidden_size": 2**20})
    ends = (2 * 131072 + 1) * 2**20
    assert int(counted.split()[0]) == 250_000 * (family.count(one).total - ends) + ends
    assert int(counted.split()[1]) == 250_000 * family.cache_bytes(one).per_token
    mebibytes, seconds = measured.split()
    assert int(mebibytes) <= 64
    assert float(seconds) < 5
