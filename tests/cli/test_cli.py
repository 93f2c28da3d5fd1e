"""The commands through typer's runner, on the random-weight model: output, JSON, exit codes, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from typer.testing import CliRunner, Result

import kvpack
from kvpack.cli.app import app
from kvpack.cli.common import codec_list, figure, int_list, size
from kvpack.eval import bench as benches
from kvpack.eval.showcase import CODECS

SMALL = ["--model", "random", "--length", "260", "--count", "2", "--window", "20"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def run_json(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVPACK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("KVPACK_OFFLINE", "1")
    monkeypatch.setattr(benches, "COLD_BYTES", 1)


def test_codecs() -> None:
    rows = {row["name"]: row for row in run_json("codecs")["codecs"]}
    assert list(rows) == kvpack.codecs()
    assert rows["tq4"]["bits"] == {"64": 4.25, "128": 4.125}
    assert rows["tq4"]["rotated"]
    assert "4.250" in run("codecs").stdout


def test_ppl_of_the_exact_cache_and_of_a_codec() -> None:
    plain = run_json("ppl", *SMALL)
    coded = run_json("ppl", "tq4/tq3", *SMALL)
    assert plain["mode"] == "exact"
    assert coded["mode"] == "emulated"
    assert coded["ppl_exact"]["value"] == pytest.approx(plain["ppl"]["value"], rel=1e-5)
    assert coded["kld"]["value"] > 0
    assert coded["cache_bytes"] < coded["dense_bytes"]
    said = run("ppl", "tq4/tq3", *SMALL).stdout
    assert "mode emulated" in said
    assert "RANDOM WEIGHTS" in said
    assert "KLD" in said
    assert "PPL" in run("ppl", *SMALL).stdout


@pytest.mark.parametrize("mode", ["fake", "chunked", "stepwise"])
def test_ppl_in_every_mode(mode: str) -> None:
    assert run_json("ppl", "tq3", "--mode", mode, *SMALL[:-4], "--count", "1", "--window", "20")["mode"] == mode


def test_sweep_writes_rows_and_a_picture_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["sweep", *SMALL[:-2], "--codecs", "tq4,tq2", "--windows", "10,30", "--out", str(out)]
    rows = run_json(*arguments)["rows"]
    assert [(row["label"], row["window"], row["taken_over"]) for row in rows] == [
        ("tq4", 10, False), ("tq4", 30, False), ("tq2", 10, False), ("tq2", 30, False),
    ]  # fmt: skip
    assert len(list((out / "rows").glob("*.json"))) == 4
    again = run(*arguments)
    assert again.exit_code == 0
    assert "PPL ratio" in again.stdout
    assert again.stderr.count("taken over") == 4
    if "picture:" in again.stdout:
        assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_on_ray_needs_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run("sweep", *SMALL[:-2], "--codecs", "tq4", "--out", str(tmp_path), "--ray")
    assert result.exit_code == 3
    assert "pip install 'kvpack[ray]'" in result.stderr


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_sweep_on_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'kvpack[ray]')")
    arguments = ["sweep", *SMALL[:-2], "--codecs", "tq4,tq2", "--windows", "10,30", "--out", str(tmp_path)]
    rows = run_json(*arguments, "--ray", "--workers", "2")["rows"]
    assert [(row["label"], row["window"]) for row in rows] == [("tq4", 10), ("tq4", 30), ("tq2", 10), ("tq2", 30)]
    again = run_json(*arguments)["rows"]  # Ray or not, the rows are the same files
    assert [row["taken_over"] for row in again] == [True] * 4
    assert [row["kld"] for row in again] == [row["kld"] for row in rows]


def test_bench() -> None:
    arguments = [
        "bench",
        "--codecs",
        "exact,tq4",
        "--contexts",
        "256",
        "--kv-heads",
        "1",
        "-d",
        "64",
        "--rounds",
        "2",
    ]
    found = run_json(*arguments, "--threads", "1")
    assert [(row["what"], row["codec"]) for row in found["rows"]] == [
        *(("attend", codec) for codec in ("torch", "torch, grouped", "torch, matmul", "exact", "tq4")),
        *(("encode", codec) for codec in ("torch", "exact", "tq4")),
    ]
    assert "against torch" in run(*arguments, "--what", "attend").stdout


def test_doctor() -> None:
    result = run("doctor", "--json")
    found = json.loads(result.stdout)
    assert found["kvpack"] == kvpack.__version__
    assert found["isa_active"] in found["isa_available"]
    assert result.exit_code == (0 if found["healthy"] else 1)
    assert "operators" in run("doctor").stdout


def test_doctor_tells_of_a_torch_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "torch":
                raise ImportError("libtorch_cpu.so: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    result = run("doctor")
    assert result.exit_code == 1
    assert "TORCH DOES NOT LOAD: libtorch_cpu.so" in result.stdout


def test_doctor_explains_a_models_layers(tmp_path: Path) -> None:
    import transformers

    small = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=1, num_key_value_heads=1)
    transformers.Gemma3TextConfig(**small, head_dim=64, num_hidden_layers=6).save_pretrained(tmp_path / "gemma")
    transformers.Gemma2Config(**small, head_dim=64, num_hidden_layers=2).save_pretrained(tmp_path / "softcap")
    transformers.LlamaConfig(**small, head_dim=72, num_hidden_layers=2).save_pretrained(tmp_path / "odd")
    transformers.GPTJConfig(vocab_size=64, n_embd=64, n_head=1, n_layer=2).save_pretrained(tmp_path / "gptj")
    mimo = transformers.MiMoV2FlashConfig(**small, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    mimo.save_pretrained(tmp_path / "mimo")
    layers = json.loads(run("doctor", "--json", "--model", str(tmp_path / "gemma")).stdout)["model"]["layers"]
    assert [layer["packed"] for layer in layers] == [False] * 5 + [True]
    assert [layer["fused"] for layer in layers] == [False] * 5 + [True]
    assert "only full attention" in layers[0]["why"]
    assert layers[5]["why"] == "sdpa (the default of Gemma3ForCausalLM)"

    def last(name: str) -> dict[str, Any]:
        layers = json.loads(run("doctor", "--json", "--model", str(tmp_path / name)).stdout)["model"]["layers"]
        return layers[-1]

    softcap = last("softcap")
    assert softcap["packed"]
    if not transformers.Gemma2ForCausalLM._supports_sdpa:  # older versions let it attend without its softcap
        assert not softcap["fused"]
        assert softcap["why"] == (
            "eager (the default of Gemma2ForCausalLM): decodes on every call; kvpack.enable(model) fuses it"
        )
    assert (
        last("gptj")["why"]
        == "eager (the default of GPTJForCausalLM): decodes on every call; kvpack.enable(model) cannot change that"
    )
    assert last("mimo")["head_dims"] == [192, 128]
    assert "192/128" in run("doctor", "--model", str(tmp_path / "mimo")).stdout
    odd = json.loads(run("doctor", "--json", "--model", str(tmp_path / "odd")).stdout)["model"]
    assert not odd["layers"][0]["packed"]
    assert "72" in odd["layers"][0]["why"]
    assert "refused" in odd["verdict"]
    assert "sliding_attention" in run("doctor", "--model", str(tmp_path / "gemma")).stdout


def test_doctor_shows_the_codecs_of_layers(tmp_path: Path) -> None:
    import transformers

    small = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=1, num_key_value_heads=1)
    transformers.LlamaConfig(**small, head_dim=64, num_hidden_layers=3).save_pretrained(tmp_path / "llama")
    kvpack.Policy("tq4", "tq3", {1: ("tq2", "tq2")}).save(tmp_path / "p.json")
    arguments = ["doctor", "--model", str(tmp_path / "llama"), "--codec", str(tmp_path / "p.json")]
    found = json.loads(run(*arguments, "--json").stdout)["model"]
    assert [layer["codecs"] for layer in found["layers"]] == ["tq4/tq3", "tq2", "tq4/tq3"]
    centred = "tq4:center=tile/tq3:center=mean (2 layers), tq2:center=tile/tq2:center=mean (1 layer)"
    assert centred in found["verdict"]
    assert "tq4/tq3" in run(*arguments).stdout


def test_ppl_and_sweep_take_policies(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    kvpack.Policy("tq4", "tq3", {1: ("tq2", "tq2")}, window=20).save(path)
    assert run_json("ppl", str(path), *SMALL[:-2])["policy"] == "tq4/tq3 +1 layer"
    codecs = f"{path},tq4:scale=mse"
    rows = run_json("sweep", *SMALL[:-2], "--codecs", codecs, "--windows", "10", "--out", str(tmp_path))["rows"]
    assert [row["label"] for row in rows] == ["tq4/tq3 +1 layer", "tq4:scale=mse"]
    assert run("ppl", "small", *SMALL).exit_code == 2


def test_codec_lists_keep_options_together() -> None:
    assert codec_list("tq4:scale=mse,tq3, tq2:a=1,b=2/tq4:scale=mse,c=3 ,x") == [
        "tq4:scale=mse",
        "tq3",
        "tq2:a=1,b=2/tq4:scale=mse,c=3",
        "x",
    ]


def test_demo_falls_back_to_random_weights_and_says_so() -> None:
    result = run("demo", "--quick")
    assert result.exit_code == 0, result.output
    assert "RANDOM WEIGHTS" in result.stdout
    assert "KVPACK_OFFLINE" in result.stderr
    for name in (
        "DynamicCache",
        "q8_0",
        "q4_0",
        "tq4",
        "tq4/tq3",
        "tq3",
        "tq2",
        "emulated",
        "stepwise",
        "PPL",
    ):
        assert name in result.stdout


def test_demo_json() -> None:
    found = run_json("demo", "--quick", "--model", "random")
    assert found["random"]
    assert len(found["written"]) == 1 + len(CODECS)
    assert len(found["held"]) == 1 + len(CODECS)
    assert {row["mode"] for row in found["quality"]} == {"emulated"}
    assert found["anchor"]["mode"] == "stepwise"
    assert found["anchor"]["fused"]
    assert found["speed"]["float32"][0]["label"] == "DynamicCache"
    assert all(row["compression"] > 1.4 for row in found["held"][1:])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ppl", "tq5", *SMALL], 2, "unknown codec 'tq5'"),
        (["ppl", "tq4", *SMALL, "--mode", "slow"], 2, "'slow' is not one of"),
        (["ppl", "tq4", *SMALL, "--dtype", "int3"], 2, "'int3' is not one of"),
        (["ppl", "tq4", *SMALL[:-1], "900"], 4, "nothing would be packed"),
        (["ppl", "tq4", *SMALL, "--text", "nowhere.txt"], 3, "cannot be read"),
        (["ppl", "tq4", "--model", "/nowhere/at/all"], 3, "cannot be loaded"),
        (["ppl", "tq4"], 3, "KVPACK_OFFLINE"),
        (["sweep", "--model", "random", "--codecs", ","], 2, "no codecs were named"),
        (["sweep", "--model", "random", "--windows", "1,x"], 2, "window 'x' is not a whole number"),
        (["sweep", "--model", "random", "--workers", "2"], 2, "--workers 2 is for sweeps with --ray"),
        (["sweep", "--model", "random", "--threads", "2"], 2, "--threads 2 is for sweeps with --ray"),
        (["bench", "--what", "both"], 2, "'both' is not one of"),
        (["bench", "--contexts", "0"], 2, "context of 0"),
        (["bench", "--codecs", "tq4", "--contexts", "256", "-d", "88"], 2, "2^a times 1, 12, 20 or 28"),
        (["demo", "--dtype", "int8"], 2, "'int8' is not one of"),
        (["doctor", "--model", "default"], 3, "not in the cache yet"),
    ],
)
def test_errors_are_one_clear_line(arguments: list[str], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.strip().splitlines()[-1].startswith("kvpack: ")


def test_debug_shows_the_traceback() -> None:
    result = run("ppl", "tq5", *SMALL, "--debug")
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)


def test_help_and_version() -> None:
    assert run("--version").stdout.strip() == kvpack.__version__
    said = run("--help").stdout
    assert all(name in said for name in ("demo", "ppl", "sweep", "bench", "codecs", "doctor"))
    for name in ("demo", "ppl", "sweep", "bench", "codecs", "doctor"):
        assert "--json" in run(name, "--help").stdout


def test_help_is_quick_without_torch() -> None:
    """The help and the list of codecs import neither torch nor transformers."""
    program = (
        "import sys; from typer.testing import CliRunner; from kvpack.cli.app import app; "
        "r = CliRunner().invoke(app, ['codecs', '--json']); assert r.exit_code == 0, r.output; "
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_formats() -> None:
    assert [figure(x) for x in (0.0, 0.0123, 1.234, 0.00001234, float("nan"))] == [
        "0",
        "0.012",
        "1.2",
        "0.000012",
        "-",
    ]
    assert [size(x) for x in (100, 2048, 3 << 20, 5 << 30, None)] == [
        "100 B",
        "2.0 KiB",
        "3.0 MiB",
        "5.0 GiB",
        "-",
    ]
    assert int_list("1, 2,", "n") == [1, 2]


def test_allocate_writes_a_policy(tmp_path: Path) -> None:
    path = tmp_path / "new" / "p.json"
    arguments = ["allocate", *SMALL[:2], "--length", "260", "--count", "1", "--window", "20", "--output", str(path)]
    found = run_json(*arguments, "--verify-text", "topics", "--verify-length", "260", "--verify-count", "1")
    assert kvpack.Policy.load(path) == kvpack.Policy.from_json(found["policy"])
    assert found["bits"] <= 3.25
    assert found["verified"]["ratio"]["value"] > 0
    said = run(*arguments, "--ladder", "tq2,tq4:scale=mse,q8_0", "--bits", "5", "--name", "mine").stdout
    assert "predicted  x" in said
    assert kvpack.Policy.load(path).name == "mine"
    assert run(*arguments, "--bits", "1").exit_code == 2
