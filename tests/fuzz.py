"""Fuzzing: any bytes in the place of one file are refused with a clear line, or lead to a result that passes its own checks.

As a program: `python tests/fuzz.py SECONDS` fuzzes guided by coverage with atheris, or by hypothesis where that is not installed.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

guided: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    with contextlib.suppress(ImportError):
        import atheris

        guided = atheris.instrument_imports(include=["layercut"])
with guided:
    import layercut.verify  # noqa: F401 - the command imports it when it is called
    from layercut.cli import main

from conftest import byte_tensors, write_checkpoint  # noqa: E402
from test_header import library_accepts, stricter_on_purpose, we_accept  # noqa: E402

INDEX = "model.safetensors.index.json"
RECIPE = """\
models: {{a: {folder}/single, b: {folder}/sharded}}
slices:
  - {{model: a, layer_range: [0, 3], parameters: {{scale: 1}}}}
  - sources: [{{model: b, layer_range: [1, end]}}]
steps:
  - prune: {{at: [1, -1]}}
  - duplicate: {{at: "0-1", times: 2}}
  - keep: {{at: {{every: 2, from: 0}}}}
base_model: a
dtype:
output: {{path: {folder}/none, max_shard_size: 1KB}}
"""


class Lab:
    """Two checkpoints, a recipe, a plan and an output, of which one file at a time is replaced."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.single, self.sharded, self.out, self.cut = (folder / name for name in ("single", "sharded", "out", "cut"))
        self.recipe, self.plan, self.fixed = folder / "recipe.yaml", folder / "plan.json", folder / "fixed.yaml"
        config = {
            "model_type": "llama",
            "num_hidden_layers": 3,
            "layer_types": ["full_attention"] * 3,
            "rope_parameters": {"rope_theta": 1.5},
        }
        for source, shards in ((self.single, 1), (self.sharded, 2)):
            write_checkpoint(source, byte_tensors(3, source.name), config, shards)
        self.recipe.write_text(RECIPE.format(folder=folder), encoding="utf-8")
        self.fixed.write_text(f"model: {self.single}\nsteps: [prune: {{at: 1}}]\n", encoding="utf-8")
        self.run("plan", str(self.fixed), "-o", str(self.plan))
        self.run("run", str(self.fixed), "-q", "--out", str(self.cut))
        self.seeds: dict[Path, bytes] = {path: path.read_bytes() for path in self.files()}

    def files(self) -> list[Path]:
        """Files that are replaced, one for each target."""
        single, sharded = self.single, self.sharded
        return [single / "model.safetensors", single / "config.json", sharded / INDEX, self.recipe, self.plan, self.cut / "layercut.json"]

    def run(self, *arguments: str) -> int:
        """Exit status of a command. A bug, or a message that no line is, is an AssertionError."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(arguments)
        shown = err.getvalue()
        assert status in (0, 1), shown
        assert status == 0 or shown.startswith("error: "), shown
        assert all(line.isprintable() for line in (shown + out.getvalue()).split("\n")), shown
        return status

    @contextlib.contextmanager
    def holding(self, path: Path, data: bytes):
        """The file with other bytes."""
        path.write_bytes(data)
        try:
            yield
        finally:
            path.write_bytes(self.seeds[path])

    def cuts(self, source: Path) -> None:
        """Cutting a checkpoint says what is wrong, or gives an output that is byte for byte what it should be."""
        self.fixed.write_text(f"model: {source}\nsteps: [prune: {{at: 1}}]\n", encoding="utf-8")
        self.run("inspect", str(source))
        if self.run("run", str(self.fixed), "-q", "--overwrite", "--out", str(self.out)) == 0:
            assert self.run("verify", str(self.out), "--no-load") == 0

    def weights(self, data: bytes) -> None:
        with self.holding(self.single / "model.safetensors", data):
            ours, theirs = we_accept(self.single / "model.safetensors"), library_accepts(data)
            if ours != theirs and b"-0" not in data:
                assert theirs and stricter_on_purpose(data), data
            self.cuts(self.single)

    def config(self, data: bytes) -> None:
        with self.holding(self.single / "config.json", data):
            self.cuts(self.single)

    def index(self, data: bytes) -> None:
        with self.holding(self.sharded / INDEX, data):
            self.cuts(self.sharded)

    def recipes(self, data: bytes) -> None:
        with self.holding(self.recipe, data):
            self.run("plan", str(self.recipe), "-q")

    def plans(self, data: bytes) -> None:
        with self.holding(self.plan, data):
            self.run("run", str(self.plan), "-q", "--overwrite", "--out", str(self.out))

    def reports(self, data: bytes) -> None:
        with self.holding(self.cut / "layercut.json", data):
            self.run("verify", str(self.cut), "--no-load", "-q")
            self.run("inspect", str(self.cut))

    @property
    def targets(self) -> Mapping[Path, Callable[[bytes], None]]:
        """What to do with bytes, by the file that they replace."""
        tests = (self.weights, self.config, self.index, self.recipes, self.plans, self.reports)
        return dict(zip(self.files(), tests, strict=True))


WORDS = """" \\ { } [ ] , : - 0 1 -1 -0 1.5 1e999 NaN Infinity null true &a *a !! ../ / auto end F32 U8 __metadata__
\\u0000 \\ud800 \\n é \u202e \U0001f600"""
TOKENS = [
    *map(str.encode, WORDS.split()), b"", b"\0", b"\xff", b"\n", b"\r", b"\x1b[2J", b"&a ", b"<<: ", b"# ",
    *(str(number).encode() for number in (2**31, 2**63, 2**64)), b"9" * 5000, b"[" * 5000, b'{"a":' * 200,
]  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with one to four places cut out, repeated, moved or replaced."""
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.sampled_from([0, 0, 1, 1, 2, 5, 20, 1000])))
        part = draw(st.one_of(st.sampled_from(TOKENS), st.binary(max_size=4), st.just(data[begin:end] * 2)))
        data = data[:begin] + part + data[end:]
    return data


def by_hypothesis(lab: Lab, seconds: float) -> None:
    stop = time.monotonic() + seconds
    rounds = 0
    while time.monotonic() < stop:
        for path, target in lab.targets.items():
            quiet = settings(
                max_examples=200,
                deadline=None,
                database=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )

            def one(data: bytes, target: Callable[[bytes], None]) -> None:
                if time.monotonic() < stop:
                    target(data)

            quiet(given(changed(lab.seeds[path]), st.just(target))(one))()
            rounds += 1
    print(f"{rounds} rounds of 200 examples found nothing")


def by_coverage(lab: Lab, seconds: float) -> None:
    targets = list(lab.targets.items())
    corpus = lab.folder / "corpus"
    corpus.mkdir()
    for number, (path, _) in enumerate(targets):
        (corpus / str(number)).write_bytes(bytes([number]) + lab.seeds[path])
    words = lab.folder / "words"
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in token) + '"\n' for token in TOKENS if 0 < len(token) < 64))

    def one(data: bytes) -> None:
        if data:
            targets[data[0] % len(targets)][1](data[1:])

    options = [
        f"-max_total_time={seconds:.0f}",
        "-max_len=20000",
        "-len_control=0",
        f"-dict={words}",
        "-artifact_prefix=fuzz-",
        "-timeout=20",
    ]
    child = os.fork()  # the fuzzer ends its process, and leaves nothing for this one to clean up in
    if child == 0:
        atheris.Setup([sys.argv[0], *options, str(corpus)], one)
        atheris.Fuzz()
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"found something: see above, and {Path.cwd()}/fuzz-*")


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp(prefix="layercut-fuzz-"))
    os.environ["LAYERCUT_CACHE"] = str(place / "cache")
    try:
        (by_coverage if "atheris" in sys.modules else by_hypothesis)(Lab(place), float(sys.argv[1]))
    finally:
        shutil.rmtree(place, ignore_errors=True)
