"""Methods of other packages in the accuracy table: each quantizes in a process and by an interpreter of its own.

The scripts that run there are in benchmarks/peers. A peer gets the tokens that our methods are calibrated on and hands
back the model with dequantized weights, whose perplexity we measure.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file

from sliderquant.calibration.blocks import random_blocks
from sliderquant.calibration.text import read_text
from sliderquant.errors import SliderQuantError
from sliderquant.models.source import ModelSource, open_model
from sliderquant.schemes import ModelScheme, Scheme

__all__ = ["NOT_INSTALLED", "PEERS", "Peer", "PeerError", "PeerSettings", "peers_in"]

WORKERS = Path(__file__).parent
NOT_INSTALLED, SKIPPED, FAILED = "not installed", "skipped", "failed"
_TAIL = 20  # lines of what a failed worker printed
_VERSION = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"


class PeerError(SliderQuantError):
    """A peer has no figure at a scheme.

    Attributes:
        reason: in one or two words, for a cell of the table: "not installed", "skipped" or "failed".
        summary: in one line without paths of this machine, for the result file.
    """

    def __init__(self, reason: str, message: str, summary: str | None = None) -> None:
        super().__init__(message)
        self.reason, self.summary = reason, message if summary is None else summary


class PeerSettings(BaseModel):
    """What a peer's row depends on besides the arguments of the run.

    Attributes:
        version: of the package; None: it is not installed.
    """

    model_config = ConfigDict(frozen=True)

    package: str
    version: str | None = None


@dataclass(frozen=True)
class Peer:
    """A method of another package, for weights with zero-points, per output channel or in groups.

    Attributes:
        name: what tables call it.
        package: what it is installed by.
        worker: the script that runs it.
        python: the interpreter that has the package.
        multiple: it leaves linears in 16 bits whose numbers of inputs and outputs this does not divide.
        options: arguments that differ from the package's defaults, by the package's names.
    """

    name: str
    package: str
    worker: Path
    python: Path = Path(sys.executable)
    multiple: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> PeerSettings:
        """With the version of the package that `python` has."""
        asked = subprocess.run(
            [self.python, "-c", _VERSION, self.package], env=_environment(), capture_output=True, text=True
        )
        return PeerSettings(package=self.package, version=asked.stdout.strip() if asked.returncode == 0 else None)

    def quantize(
        self,
        settings: PeerSettings,
        model: str,
        output: Path,
        scheme: ModelScheme,
        calibration: str,
        samples: int,
        seqlen: int | None,
        seed: int,
    ) -> dict[str, Any]:
        """Quantize a model; `output` is then a folder with the model in dequantized weights.

        Args:
            settings: what `settings()` gave.
            model, calibration, samples, seqlen, seed: as `sliderquant.quantize`; the tokens are the same.

        Returns:
            `seconds` in the peer, `threads`, and `peer`, its own settings by name.

        Raises:
            PeerError: it is not installed, cannot do this scheme, or failed.
            InputError: the model or the text is not usable.
        """
        if settings.version is None:
            raise PeerError(
                NOT_INSTALLED,
                f"{self.name} needs the package {self.package}, which {self.python} does not have: pip install "
                f"{self.package}, or name an interpreter that has it: --peer-python {self.name}=PATH",
                f"pip install {self.package}, or --peer-python {self.name}=PATH",
            )
        source = open_model(model)
        self._check_scheme(scheme, source)
        linear = scheme.linear
        tokens = random_blocks(
            read_text(calibration, "calibration"),
            source.tokenizer(),
            samples,
            source.default_seqlen if seqlen is None else seqlen,
            seed,
        )
        threads = torch.get_num_threads()
        with TemporaryDirectory() as folder:
            path = Path(folder) / "calibration.safetensors"
            save_file({"input_ids": tokens}, path)
            answer = self._run(
                settings.version,
                Path(folder) / "task.json",
                {
                    "model": str(source.folder.resolve()),
                    "calibration": str(path),
                    "bits": linear.bits,
                    "group_size": linear.group_size or -1,
                    "seed": seed,
                    "threads": threads,
                    "options": dict(self.options),
                    "output": str(output.resolve()),
                },
            )
        # The model is measured with its own configuration and tokenizer, whatever version of transformers the peer has.
        for file in source.folder.iterdir():
            if file.suffix in (".json", ".txt", ".model", ".jinja") and not file.name.endswith(".index.json"):
                shutil.copyfile(file, output / file.name)
        self._check_weights(output, linear)
        return {"seconds": round(answer["seconds"], 1), "threads": threads, "peer": answer["settings"]}

    def _check_scheme(self, scheme: ModelScheme, source: ModelSource) -> None:
        if scheme.quantizes_activations or scheme.quantizes_attention:
            raise PeerError(SKIPPED, f"{self.name} is compared where weights alone are quantized, unlike {scheme}")
        if scheme.linear.symmetric:
            raise PeerError(SKIPPED, f"{self.name} is compared at weights with zero-points, unlike {scheme}")
        for name in source.linear_names:
            shape, _ = source.shapes[f"{name}.weight"]
            if not scheme.linear.fits(shape[1]):
                raise PeerError(
                    SKIPPED, f"groups of {scheme.linear.group_size} do not divide the {shape[1]} inputs of {name}"
                )
            if any(size % self.multiple for size in shape):
                raise PeerError(
                    SKIPPED,
                    f"{self.name} leaves linears in 16 bits whose sizes {self.multiple} does not divide: {name} has "
                    f"{shape[1]} inputs and {shape[0]} outputs",
                )

    def _run(self, version: str, path: Path, task: dict[str, Any]) -> dict[str, Any]:
        path.write_text(json.dumps(task), encoding="utf-8")
        log = path.with_suffix(".log")
        with log.open("wb") as file:
            # Not in this folder: what the peer leaves in its working directory goes with the task.
            ended = subprocess.run(
                [self.python.absolute(), self.worker.absolute(), path.name],
                cwd=path.parent, env=_environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        answer = Path(f"{task['output']}.json")
        if ended.returncode == 0 and answer.is_file():
            return json.loads(answer.read_text(encoding="utf-8"))
        printed = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
        tail = [line for line in printed if line.strip()][-_TAIL:]
        how = f"exit status {ended.returncode}" if ended.returncode else "it wrote no answer"
        message = f"{self.name} ({self.package} {version}) failed, {how}; the last lines that it printed:"
        raise PeerError(
            FAILED,
            "\n  ".join([message, *tail]),
            f"{how}: {_without_folders(tail[-1]) if tail else 'it printed nothing'}",
        )

    def _check_weights(self, folder: Path, scheme: Scheme) -> None:
        """A weight that the peer left out, or quantized to another scheme, would pass for a good perplexity."""
        dense = open_model(folder)
        for name in dense.linear_names:
            weight = dense.weight(f"{name}.weight", torch.device("cpu"))
            groups = weight.view(-1, scheme.group_size or weight.shape[1])
            levels = 1 + int((groups.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1).max())
            if levels > scheme.levels + 1:
                found = f"{name} has {levels} values in one group, more than the {scheme.levels + 1} of {scheme}"
                raise PeerError(FAILED, f"{self.name} returned another scheme: {found}", found)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("autoround", "auto-round", WORKERS / "autoround.py", multiple=32),
        # What `auto-round --light` is, aside from samples and their length, which all methods share.
        Peer("autoround-light", "auto-round", WORKERS / "autoround.py", multiple=32, options={"iters": 50, "lr": 5e-3}),
        Peer("llm-compressor-gptq", "llmcompressor", WORKERS / "llm_compressor_gptq.py"),
    )
}


def peers_in(names: Iterable[str], interpreters: Iterable[str]) -> list[Peer]:
    """The peers of these names, each with its interpreter.

    Args:
        interpreters: "NAME=PATH"; peers without one use the running interpreter.

    Raises:
        SystemExit: an interpreter is not named so, is not there, or is of none of these peers.
    """
    found = {name: PEERS[name] for name in names}
    for given in interpreters:
        name, _, path = given.partition("=")
        if name not in found:
            among = ", ".join(found) or "--peers, which is empty"
            raise SystemExit(f"--peer-python {given}: expected NAME=PATH with a name of {among}")
        python = Path(path).expanduser()
        if not (python.is_file() and os.access(python, os.X_OK)):
            raise SystemExit(f"--peer-python {given}: there is no interpreter at {path!r}: give the path of its python")
        found[name] = dataclasses.replace(found[name], python=python)
    return list(found.values())


def _environment() -> dict[str, str]:
    """Without what would make the peer's interpreter import from this one's folders."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _without_folders(line: str) -> str:
    return " ".join(word if "/" not in word else word.rstrip("/").rpartition("/")[2] for word in line.split())
