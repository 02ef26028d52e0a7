"""The settings: three sources, one schema, errors that say where."""

from __future__ import annotations

import argparse
import re
import tomllib
import typing
from pathlib import Path

import pytest

from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.settings_file import add_arguments, collect_values, known_keys, load_settings, settings_from

REPOSITORY = Path(__file__).parents[2]


def test_no_source_gives_the_defaults():
    assert load_settings(None, {}, []) == Settings()


def test_config_toml_holds_every_key_with_its_default_and_no_other():
    # Given the schema and the file, both as flat keys
    schema = {key.path: key.default for key in known_keys(Settings().pools)}
    file = flat(tomllib.loads((REPOSITORY / "config.toml").read_text()))

    # Then each holds what the other holds
    assert file == schema
    assert load_settings(REPOSITORY / "config.toml", {}, []) == Settings()


def test_every_key_of_config_toml_has_a_comment():
    lines = (REPOSITORY / "config.toml").read_text().splitlines()
    keys = [line for line in lines if re.match(r"\w+ = ", line)]
    assert len(keys) == len(known_keys(Settings().pools))
    assert [line for line in keys if not re.search(r"  # \S+", line)] == []


def test_a_variable_wins_over_the_file_and_a_flag_over_both(tmp_path):
    file = write(tmp_path, "[api]\nport = 1\nhost = '0.0.0.0'\nping_s = 3")
    values = collect_values(file, {"BATON_API_PORT": "2", "BATON_API_HOST": "::1"}, ["api.port=3"])
    assert values["api.port"] == (3, "--set")
    assert values["api.host"] == ("::1", "BATON_API_HOST")
    assert values["api.ping_s"] == (3.0, str(file))
    assert values["log.level"] == ("info", "default")


def test_every_key_can_be_set_by_its_variable_and_by_a_flag():
    spelled = {bool: "true", int: "7", float: "0.75", str: "text"}
    for key in known_keys(["baton-tiny"]):
        plain = typing.get_args(key.type)[0] if typing.get_origin(key.type) is typing.Annotated else key.type
        text = spelled.get(plain) or typing.get_args(plain)[0]
        for values in (
            collect_values(None, {key.env: text}, []),
            collect_values(None, {}, [f"{key.path}={text}"]),
        ):
            assert str(values[key.path].value).lower() == text
            assert type(values[key.path].value) is (plain if plain in spelled else str)


def test_no_two_keys_share_a_variable():
    names = [key.env for key in known_keys(["baton-tiny"])]
    assert len(set(names)) == len(names)


def test_pools_of_the_file_replace_the_default_one_and_have_variables(tmp_path):
    file = write(tmp_path, '[pools."qwen2.5-0.5b"]\nengine = "mock"')
    settings = load_settings(file, {"BATON_POOLS_QWEN2_5_0_5B_MODEL": "Qwen/Qwen2.5-0.5B"}, [])
    assert list(settings.pools) == ["qwen2.5-0.5b"]
    assert settings.pools["qwen2.5-0.5b"].model == "Qwen/Qwen2.5-0.5B"
    assert settings.pools["qwen2.5-0.5b"].engine == "mock"


def test_a_flag_can_add_a_pool():
    settings = load_settings(None, {}, ["pools.qwen2.5.model=Qwen/Qwen2.5-0.5B"])
    assert settings.pools["qwen2.5"].model == "Qwen/Qwen2.5-0.5B"
    assert "baton-tiny" in settings.pools


@pytest.mark.parametrize(
    ("toml", "env", "flags", "message"),
    [
        ("[api]\nprot = 1", {}, [], "{file}: unknown key api.prot; did you mean api.port?"),
        ("[apy]\nport = 1", {}, [], "{file}: unknown key apy; did you mean api?"),
        ("port = 1", {}, [], "{file}: unknown key port; did you mean api.port?"),
        (
            "[engine.torch]\nblocks = 1",
            {},
            [],
            "{file}: unknown key engine.torch.blocks; did you mean engine.torch.num_blocks?",
        ),
        ("[pools.tiny]\nmodle = 'x'", {}, [], "{file}: unknown key pools.tiny.modle; did you mean pools.tiny.model?"),
        ("[pools]\ntiny = 'x'", {}, [], "{file}: pools.tiny: expected a table [pools.tiny]"),
        (
            "[pools.'a{b}']\nmodel = 'x'",
            {},
            [],
            "{file}: pools.a{{b}}: a pool's name is 1 to 64 letters, digits, dots, _ and -",
        ),
        (
            "[api]\nport = '8000'",
            {},
            [],
            "{file}: api.port: expected a whole number of at least 0 and at most 65535, got '8000'",
        ),
        (
            "[api]\nport = true",
            {},
            [],
            "{file}: api.port: expected a whole number of at least 0 and at most 65535, got True",
        ),
        ("[log]\nlevel = 'loud'", {}, [], "{file}: log.level: expected one of debug, info, warning, error, got 'loud'"),
        ("api = 1", {}, [], "{file}: unknown key api: it is a section, [api]"),
        ("[api", {}, [], "{file}: is not TOML: Expected ']' at the end of a table declaration (at end of document)"),
        ("", {"BATON_API_PROT": "1"}, [], "environment: unknown variable BATON_API_PROT; did you mean BATON_API_PORT?"),
        (
            "",
            {"BATON_API_PORT": "x"},
            [],
            "environment: BATON_API_PORT: expected a whole number of at least 0 and at most 65535, got 'x'",
        ),
        (
            "",
            {"BATON_TRANSFER_VERIFY": "maybe"},
            [],
            "environment: BATON_TRANSFER_VERIFY: expected true or false, got 'maybe'",
        ),
        ("", {}, ["api.prot=1"], "--set: unknown key api.prot; did you mean api.port?"),
        ("", {}, ["api.port"], "--set api.port: expected KEY=VALUE, such as api.port=8001"),
        (
            "",
            {},
            ["api.port=70000"],
            "--set: api.port: expected a whole number of at least 0 and at most 65535, got '70000'",
        ),
        (
            "[engine.torch]\nblock_size = 0",
            {},
            [],
            "{file}: engine.torch.block_size: expected a whole number of at least 1, got 0",
        ),
        ("[worker]\nlease_s = inf", {}, [], "{file}: worker.lease_s: expected a number above 0, got inf"),
        ("", {}, ["worker.lease_s=soon"], "--set: worker.lease_s: expected a number above 0, got 'soon'"),
    ],
)
def test_a_wrong_setting_is_named_with_its_source(tmp_path, toml, env, flags, message):
    file = write(tmp_path, toml)
    with pytest.raises(ConfigError) as error:
        load_settings(file, env, flags)
    assert str(error.value) == message.format(file=file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read: No such file"):
        load_settings(tmp_path / "nowhere.toml", {}, [])


def test_other_variables_are_left_alone():
    assert load_settings(None, {"PATH": "/bin", "BATON_CONFIG": "x.toml"}, []) == Settings()


def test_the_file_comes_from_the_flag_else_the_variable_else_the_folder(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, port in (("flag.toml", 1), ("variable.toml", 2), ("config.toml", 3)):
        (tmp_path / name).write_text(f"[api]\nport = {port}")
    monkeypatch.chdir(tmp_path)

    flag = parser.parse_args(["--config", "flag.toml"])
    nothing = parser.parse_args([])
    override = parser.parse_args(["--set", "api.port=4", "--set", "log.level=debug"])

    assert settings_from(flag, {"BATON_CONFIG": "variable.toml"}).api.port == 1
    assert settings_from(nothing, {"BATON_CONFIG": "variable.toml"}).api.port == 2
    assert settings_from(nothing, {}).api.port == 3
    assert settings_from(override, {}).api.port == 4
    assert settings_from(override, {}).log.level == "debug"


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text)
    return path


def flat(table: dict, prefix: str = "") -> dict:
    keys = {}
    for name, value in table.items():
        keys |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return keys
