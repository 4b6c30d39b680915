"""The file of compiled kernels: what it says, when it serves, and how it is unpacked."""

import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from benchmarks.gpu.cache import archive as cache
from benchmarks.gpu.cache.archive import CacheError, Manifest

TEXT = json.dumps({"module": "sliderquant_kernels.elementwise.kernels", "name": "rms_norm_kernel"})


@pytest.fixture
def here(tmp_path: Path) -> Manifest:
    """Of a cache that this interpreter could have made."""
    return Manifest(triton.__version__, cache._triton_key(), cache._ptxas_version(), torch.__version__, "3.12.1", 90,
                    str(tmp_path / "tc"), 1, {})  # fmt: skip


def entry(folder: Path, name: str, *files: str) -> Path:
    """What Triton keeps of a kernel."""
    made = folder / name
    made.mkdir(parents=True)
    files = files or ("k.cubin", "k.json", "__grp__k.json")
    for file in files:
        listed = {"child_paths": {other: str(made / other) for other in files if other[0] != "_"}}
        (made / file).write_text(json.dumps(listed) if file.startswith("__grp__") else f"{name} {file}")
    return made


@pytest.fixture
def packed(tmp_path: Path, here: Manifest) -> Callable[..., Path]:
    """`packed(manifest)`: a file with one kernel."""

    def packed(manifest: Manifest = here, name: str = "cache.tar.xz", key: str = "KEY") -> Path:
        source = tmp_path / f"source of {name}"
        cache.pack(tmp_path / name, manifest, [TEXT], [entry(source, key)])
        return tmp_path / name

    return packed


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_file_says_what_it_holds(packed: Callable[..., Path], here: Manifest) -> None:
    file = packed()
    assert cache.manifest(file) == here
    assert cache.texts(file) == [TEXT]
    assert cache.mismatch(here) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"triton": "3.1.4"}, f"built for triton 3.1.4, this is {triton.__version__}: kernels will be compiled anew"),
        ({"triton_key": "0"}, "built by another build of triton .* than the one installed here"),
        ({"ptxas": "ptxas: release 11.0, V11.0.1\n"}, r"built with ptxas V11.0.1, triton has V\d.* here"),
    ],
)
def test_what_makes_a_file_useless(changes: dict[str, str], why: str, here: Manifest) -> None:
    found = cache.mismatch(replace(here, **changes))
    assert found is not None
    assert re.fullmatch(why + ".*", found)


def test_a_gpu_of_another_kind(here: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_arch", lambda: 80)
    assert cache.mismatch(here) == "built for sm_90, this GPU is sm_80: kernels will be compiled anew"
    monkeypatch.setattr(cache, "_arch", lambda: 90)
    assert cache.mismatch(here) is None


def test_unpacking_brings_binaries_to_their_folder(here: Manifest, tmp_path: Path) -> None:
    made = entry(tmp_path / "made", "KEY", "k.cubin", "k.json", "__grp__k.json", "k.source", "lock")
    cache.pack(tmp_path / "file", here, [TEXT], [made])
    folder = cache.unpack(tmp_path / "file")
    assert folder == tmp_path / "tc"
    found = contents(folder)
    assert set(found) == {"KEY/k.cubin", "KEY/k.json", "KEY/__grp__k.json", "manifest.json"}
    assert found["KEY/k.cubin"] == "KEY k.cubin"
    # Some releases of Triton find nothing where a file of the list is missing.
    assert set(json.loads(found["KEY/__grp__k.json"])["child_paths"]) == {"k.cubin", "k.json"}


def test_what_was_compiled_since_stays(packed: Callable[..., Path], here: Manifest) -> None:
    file = packed()
    folder = cache.unpack(file)
    entry(folder, "SINCE")
    assert (cache.unpack(file) / "SINCE").is_dir()
    assert not (cache.unpack(file, anew=True) / "SINCE").exists()
    entry(folder, "SINCE")
    cache.unpack(packed(replace(here, kernels=2), "newer.tar.xz", "OTHER"))
    assert sorted(path.name for path in folder.iterdir()) == ["OTHER", "manifest.json"]


def test_a_folder_that_holds_something_else(packed: Callable[..., Path], here: Manifest, tmp_path: Path) -> None:
    file, folder = packed(), Path(here.folder)
    folder.mkdir()
    (folder / "letter").write_text("dear")
    for attempt in (lambda: cache.unpack(file), lambda: cache.claim(folder)):
        with pytest.raises(CacheError, match=r"tc: .*something else .*move it away"):
            attempt()
    assert contents(folder) == {"letter": "dear"}
    with pytest.raises(CacheError, match="'here', which is no absolute path"):
        cache.unpack(packed(replace(here, folder="here"), "relative.tar.xz"))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98])
def test_a_file_that_is_not_whole(share: float, here: Manifest, tmp_path: Path) -> None:
    made = entry(tmp_path / "made", "KEY")
    (made / "k.cubin").write_bytes(os.urandom(100_000))
    file = tmp_path / "cache.tar.xz"
    cache.pack(file, here, [TEXT], [made])
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CacheError, match=r"cache.tar.xz: .*`make gpu-cache` builds it"):
        cache.unpack(file)
    assert not Path(here.folder).exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_files_that_are_no_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="there is no such file"):
        cache.manifest(tmp_path / "absent")
    with tarfile.open(tmp_path / "other.tar", "w:xz") as tar:
        tar.add(__file__, "manifest.txt")
    with pytest.raises(CacheError, match=r"holds no manifest.json"):
        cache.manifest(tmp_path / "other.tar")

    with tarfile.open(tmp_path / "old", "w:xz") as tar:
        cache._add(tar, "manifest.json", b'{"triton": "3.6.0"}')
    with pytest.raises(CacheError, match="its manifest has other entries than arch, folder"):
        cache.manifest(tmp_path / "old")


def with_member(file: Path, out: Path, member: tarfile.TarInfo, content: bytes = b"") -> None:
    """Write a file with what another holds, and one member more."""
    with tarfile.open(file) as whole, tarfile.open(out, "w:xz") as tar:
        for each in whole:
            tar.addfile(each, whole.extractfile(each))
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("name", ["../outside", "cache/../../outside", "/outside"])
def test_nothing_is_unpacked_elsewhere(name: str, packed: Callable[..., Path], here: Manifest, tmp_path: Path) -> None:
    name = str(tmp_path / "outside") if name[0] == "/" else name
    with_member(packed(), tmp_path / "evil", tarfile.TarInfo(name), b"evil")
    if Path(name).is_absolute():
        cache.unpack(tmp_path / "evil")  # as if it began behind the slash, where nothing is kept
        assert set(os.listdir(here.folder)) == {"KEY", "manifest.json"}
    else:
        with pytest.raises(CacheError, match=r"evil: .*outside"):
            cache.unpack(tmp_path / "evil")
        assert not Path(here.folder).exists()
    assert not list(tmp_path.rglob("outside"))


def test_links_out_of_the_folder_are_refused(packed: Callable[..., Path], here: Manifest, tmp_path: Path) -> None:
    link = tarfile.TarInfo("cache/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    with_member(packed(), tmp_path / "evil", link)
    with pytest.raises(CacheError, match="evil: "):
        cache.unpack(tmp_path / "evil")
    assert not Path(here.folder).exists()


def test_a_file_is_replaced_whole_or_not_at_all(packed: Callable[..., Path], here: Manifest, tmp_path: Path) -> None:
    file = packed()
    before = file.read_bytes()
    with pytest.raises(FileNotFoundError):
        cache.pack(file, here, [TEXT], [tmp_path / "absent"])
    unreadable = entry(tmp_path / "again", "KEY", "k.cubin")
    (unreadable / "k.cubin").unlink()
    os.symlink(tmp_path / "nowhere", unreadable / "k.cubin")
    cache.pack(tmp_path / "other", here, [TEXT], [unreadable])
    assert file.read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_the_pinned_ptxas_is_tritons_own_and_survives_inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path

    variables = cache.environment(tmp_path)
    assert variables["TRITON_CACHE_DIR"] == str(tmp_path)
    pinned = Path(variables["TRITON_PTXAS_PATH"])
    assert pinned.is_relative_to(Path(triton.__file__).parent)
    assert subprocess.check_output([pinned, "--version"], text=True) == cache._ptxas_version()
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(pinned))
    _set_triton_ptxas_path.__wrapped__()
    assert os.environ["TRITON_PTXAS_PATH"] == str(pinned)
