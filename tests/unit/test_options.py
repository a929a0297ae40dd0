"""Flags over variables over the file over defaults, and one line for what makes no sense."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.options import build, command, options_of, resolve, to_argv
from mesh.config import GatewayConfig, PlacementConfig, WorkerConfig, option
from mesh.errors import ConfigError


@dataclass(frozen=True)
class Oven:
    rows: int = option(4, "Rows of buns.")
    heat: float = option(1.5, "How hot.")
    fan: bool = option(True, "Whether the fan runs.")
    mode: Literal["bake", "grill"] = option("bake", "What it does.")
    recipe: Path | None = option(None, "What to read.")


OPTIONS = options_of(Oven)


def values(flags: dict[str, Any], environ: dict[str, str], file: Path | None) -> Oven:
    return build(Oven, resolve(OPTIONS, flags, environ, file))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "oven.toml"
    path.write_text('rows = 6\nheat = 2\nfan = false\nrecipe = "buns.md"\n')
    return path


def test_a_flag_beats_a_variable_beats_the_file_beats_the_default(file: Path) -> None:
    assert values({}, {}, None).rows == 4
    assert values({}, {}, file).rows == 6
    assert values({}, {"EXPERT_MESH_ROWS": "7"}, file).rows == 7
    assert values({"rows": "8"}, {"EXPERT_MESH_ROWS": "7"}, file).rows == 8


def test_each_kind_is_read_from_text_and_from_toml(file: Path) -> None:
    from_file = Oven(rows=6, heat=2.0, fan=False, mode="bake", recipe=Path("buns.md"))
    assert values({}, {}, file) == from_file
    said = {"rows": "6", "heat": "2", "fan": False, "recipe": "buns.md"}
    assert values(said, {}, None) == from_file


@pytest.mark.parametrize(
    ("flags", "environ", "complaint"),
    [
        ({"rows": "many"}, {}, "--rows: 'many' is not a whole number"),
        ({"heat": "hot"}, {}, "--heat: 'hot' is not a number"),
        ({"mode": "boil"}, {}, "--mode: 'boil' is none of bake, grill"),
        ({}, {"EXPERT_MESH_FAN": "maybe"}, "EXPERT_MESH_FAN: 'maybe' is not true or false"),
    ],
)
def test_a_bad_value_is_named_with_where_it_came_from(
    flags: dict[str, Any], environ: dict[str, str], complaint: str
) -> None:
    with pytest.raises(ConfigError) as error:
        values(flags, environ, None)
    assert str(error.value) == complaint


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rows = 1.5", "rows: 1.5 is not a whole number"),
        ("rows = true", "rows: True is not a whole number"),
        ("cheese = 1", "no such option: cheese"),
        ("rows =", "Invalid value"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "oven.toml").write_text(text)
    with pytest.raises(ConfigError, match=f"oven.toml: .*{complaint}"):
        values({}, {}, tmp_path / "oven.toml")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        values({}, {}, tmp_path / "none.toml")


@given(
    st.builds(
        Oven,
        rows=st.integers(),
        heat=st.floats(allow_nan=False),
        fan=st.booleans(),
        mode=st.sampled_from(["bake", "grill"]),
        recipe=st.none() | st.just(Path("buns.md")),
    )
)
def test_a_configuration_survives_its_own_argv(oven: Oven) -> None:
    heard: list[dict[str, Any]] = []
    app = typer.Typer()
    app.command()(command(OPTIONS, heard.append))
    result = CliRunner().invoke(app, to_argv(oven))
    assert result.exit_code == 0, result.output
    assert [build(Oven, values) for values in heard] == [oven]


@pytest.mark.parametrize("config_type", [PlacementConfig, WorkerConfig, GatewayConfig])
def test_every_field_of_a_real_configuration_is_an_option_with_help(config_type: type) -> None:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(command(options_of(config_type), lambda _: None))
    output = CliRunner().invoke(app, ["--help"]).output
    shown = " ".join(output.split())
    for each in options_of(config_type):
        assert each.flag in shown
        assert each.help in shown


@pytest.mark.parametrize(
    ("said", "row_bytes", "rows"),
    [
        ({}, 512, (4096, 8192)),
        ({"device": "cuda:1"}, 4096, (16000, 16000)),
        ({"device": "cuda"}, 14336, (4681, 8192)),
        ({"max_rows": 9000}, 512, (9000, 9000)),
        ({"device": "cuda", "max_rows": 64, "merge_rows": 64}, 4096, (64, 64)),
    ],
)
def test_how_long_messages_may_be_follows_from_the_device_and_the_rows(
    said: dict[str, Any], row_bytes: int, rows: tuple[int, int]
) -> None:
    config = WorkerConfig(**said).for_rows(row_bytes)
    assert (config.max_rows, config.merge_rows) == rows


def test_what_one_step_may_hold_follows_from_the_device() -> None:
    on_cpu, on_gpu = GatewayConfig(), GatewayConfig(device="cuda:1")
    assert (on_cpu.max_batch_tokens, on_cpu.max_running, on_cpu.overlap_tokens) == (512, 64, 256)
    assert (on_gpu.max_batch_tokens, on_gpu.max_running, on_gpu.overlap_tokens) == (8192, 256, 4096)
    assert (on_cpu.rehearsal_s, on_gpu.rehearsal_s) == (0, 60)
    said = GatewayConfig(device="cuda", max_batch_tokens=64, max_running=8, overlap_tokens=0)
    assert (said.max_batch_tokens, said.max_running, said.overlap_tokens) == (64, 8, 0)
