"""What is known about the machine, and about what runs on it."""

import subprocess

import torch

from benchmarks.kernels.harness import machine


def test_versions_change_with_the_sources(tmp_path, monkeypatch):
    (tmp_path / "tuned").mkdir()
    source, table = tmp_path / "__init__.py", tmp_path / "tuned" / "gpu.json"
    source.write_text("a = 1")
    table.write_text("{}")
    monkeypatch.setattr("sliderquant_kernels.__file__", str(source))
    found = [machine.versions()]
    for path, text in ((source, "a = 2"), (table, "[]"), (tmp_path / "notes.txt", "not a source")):
        path.write_text(text)
        found.append(machine.versions())
    digests = [versions["sliderquant_kernels"] for versions in found]
    assert len(set(digests[:3])) == 3
    assert digests[2] == digests[3]
    assert found[0]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


def test_installed_reads_pinned_names_and_imports_nothing():
    assert machine.installed("torch==1.0") == machine.installed("torch") is not None
    assert machine.installed("no-such-package==1.0") is None


def test_clocks_are_what_nvidia_smi_says(monkeypatch):
    answer = "NVIDIA H200, 580.1, 1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 400.00 W, 700.00 W, 45\n"
    asked = []

    def run(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=answer)

    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    found = machine.clocks()
    assert found["driver_version"] == "580.1"
    assert found["clocks.sm"] == "1980 MHz"
    assert found["temperature.gpu"] == "45"
    assert "--id=3" in asked[0]
    assert not any(word.startswith(("-r", "-pm", "-pl", "-ac", "-lgc")) for word in asked[0])  # reads only


def test_without_nvidia_smi_nothing_is_known(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert machine.clocks() is None
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("subprocess.run", _fails)
    assert machine.clocks() is None


def _fails(command, **options):
    raise subprocess.TimeoutExpired(command, 20)


def test_cache_of_a_cpu():
    assert machine.cache_bytes(torch.device("cpu")) >= 1 << 18
    assert machine.describe(torch.device("cpu"))["threads"] == torch.get_num_threads()
