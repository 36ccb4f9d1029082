"""Writes docs/architectures.md and docs/measured.md: every model type of the installed transformers is cut or measured.

    python docs/outcomes.py architectures|measured [TASK:TYPE ...]

Without types all of them are run, which takes a quarter of an hour; with types these, and the other rows stay.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TASKS = {
    "causal": "Language models", "image": "Models that read images, and others with a language model inside", "masked": "Encoders",
    "seq2seq": "Encoder-decoders, and speech",
}  # fmt: skip


class Page(NamedTuple):
    """A page that lists an outcome for every type. The types are run by `examine` of a module of the tests."""

    name: str
    runs: str
    text: Callable[[str], list[str]]
    """Title and text, of a version of transformers."""
    kinds: Mapping[str, str]
    """Heads of the columns that outcomes are counted in."""
    kind_of: Callable[[str], str]
    """The column of an outcome."""

    @property
    def path(self) -> Path:
        return ROOT / "docs" / f"{self.name}.md"

    @property
    def version(self) -> str:
        """The version of transformers that the page is of."""
        found = re.search(r"type of transformers (\S+)[,.]\s", self.path.read_text(encoding="utf-8"))
        return found[1] if found else ""

    def listed(self) -> dict[str, str]:
        """The rows of the page as it stands, outcomes by `task:type`."""
        rows: dict[str, str] = {}
        task = ""
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            heading = re.fullmatch(r"## .* \(`(\w+)`\)", line)
            task = heading[1] if heading else task
            cells = re.fullmatch(r"\| `([^`]+)` \| (.*) \|", line)
            if cells and task:
                rows[f"{task}:{cells[1]}"] = cells[2].replace("\\|", "|")
        return rows

    def document(self, rows: Mapping[str, str], version: str) -> str:
        """The page: a table that counts outcomes, and a table of the types of each task, in order."""
        found = {
            task: sorted((name.partition(":")[2], told) for name, told in rows.items() if name.startswith(f"{task}:")) for task in TASKS
        }
        counts, sections = [], []
        for task, title in TASKS.items():
            count = Counter(self.kind_of(told) for _, told in found[task])
            counts.append(f"| {title} (`{task}`) | {' | '.join(map(str, (count.total(), *(count[kind] for kind in self.kinds))))} |")
            sections += ["", f"## {title} (`{task}`)", "", "| type | outcome |", "|---|---|"]
            sections += [f"| `{name}` | {told.replace('|', chr(92) + '|')} |" for name, told in found[task]]
        head = ["", f"| list | types | {' | '.join(self.kinds.values())} |", "|---|" + "---:|" * (1 + len(self.kinds))]
        comment = f"<!-- Written by docs/outcomes.py {self.name}. -->"
        return "\n".join([comment, "", *self.text(version), *head, *counts, *sections]) + "\n"

    def write(self, wanted: list[str]) -> int:
        """Run the types, all if none is wanted, and write the page; 1 when something is wrong."""
        import transformers

        rows = self.listed() if wanted else {}
        for name, told in self._run(wanted):
            print(name, told, file=sys.stderr, flush=True)
            rows[name] = told
        self.path.write_text(self.document(rows, transformers.__version__), encoding="utf-8")
        return int(any("wrong" in told for told in rows.values()))

    def _run(self, wanted: list[str]) -> Iterator[tuple[str, str]]:
        os.environ["HF_HUB_OFFLINE"] = "1"
        sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
        import sweep
        import torch
        import transformers
        import zoo

        torch.set_num_threads(1)
        transformers.utils.logging.set_verbosity(50)
        transformers.utils.logging.disable_progress_bar()
        examine = importlib.import_module(self.runs).examine
        for kind, task in zoo.pairs():
            if not wanted or f"{task}:{kind}" in wanted:
                with tempfile.TemporaryDirectory() as scratch:
                    os.environ["LAYERCUT_CACHE"] = f"{scratch}/cache"
                    yield f"{task}:{kind}", sweep.row(examine(kind, task, Path(scratch)))


def _cut(version: str) -> list[str]:
    return [
        "# Architectures", "",
        f"What becomes of a cut, for every model type of transformers {version}, in its four lists of models for text.",
        "A tiny random model of each type is saved by transformers, cut by layercut at the first, second, middle, last but one and last",
        "layer and once a block, loaded again, and compared with the source in which these layers are skipped in memory: no tensor",
        "missing, unexpected or of another shape, fp32 logits within 2e-4, and where the class generates, the same eight tokens with a",
        "cache as without. A layer that is skipped is one that never stood in its list: where layers run in a loop, it is left out of",
        "every run, and what layers hand on beside the hidden states (the router's state of ZAYA, the blocks of Inkling 2) passes it by.",
        "What the first layer does for all of them is not part of it: the position bias of T5, the norm of the embeddings of RWKV.", "",
        "- **exact**: all of this holds at every place.",
        "- **refused**: layercut says why and writes nothing. With `allow: inexact` some of these are written, and the report says so.",
        *NOT_RUN, "",
        "Where the arithmetic of a layer depends on its index or on the depth, its weights make up for it (`beam`, `diffllama`, `esmc`,",
        "`gpt2` with `scale_attn_by_inverse_layer_idx`). Depth-dependent values that cannot say the new order, parts that only some layers",
        "have, and shared weights are why some places are refused. Types that layercut does not know are cut by the same rules; what",
        "these cannot explain stops the run, and a recipe can declare it (`architecture`).",
    ]  # fmt: skip


def _measured(version: str) -> list[str]:
    from layercut.exceptions import PADDED

    return [
        "# What is measured", "",
        f"What becomes of `layercut analyze`, and of a cut that is left to measuring, for every model type of transformers {version}.",
        "A tiny random model of each type is measured on four texts of different lengths, padded to one batch where the type allows it.",
        "The states between its layers are compared with those that plain hooks see in the model of the task, one text at a time,",
        "without pads and mask: all L + 1 of them agree to 2e-4 of their size. No hook stays attached.", "",
        "- **measured**: this holds, and streamed layer by layer the numbers are the same.",
        "- **measured in memory only**: this holds; what is larger than memory is refused, with the reason given here.",
        "- **refused**: layercut says why and measures nothing. Recipes without `auto` need no measuring.",
        *NOT_RUN, "",
        "Encoder-decoders read the text on both sides; `stack: encoder` and `stack: decoder` pick the side. Models that also read",
        "images or hear are given the text alone. Where layers keep several residual streams, a state is all of them side by side.",
        f"Types in which pads change other tokens whatever the mask ({', '.join(f'`{kind}`' for kind in sorted(PADDED))})",
        "are measured in batches of one length.",
    ]  # fmt: skip


NOT_RUN = (
    "- **not run**: transformers cannot run the type here. Packages that towers of some types need (timm, torchvision, scipy) were",
    "  installed.",
)


def _kind_of_cut(told: str) -> str:
    if told == "exact" or told.startswith("not run"):
        return told.partition(":")[0]
    return "some" if "exact" in told else "refused"


def _kind_of_measured(told: str) -> str:
    """The least of the stacks."""
    if told.startswith("not run"):
        return "not run"
    if re.search(r"(^|: )refused: ", told):
        return "refused"
    return "in memory only" if "measured in memory only" in told else "measured"


CUT = {"exact": "exact everywhere", "some": "refused at some places", "refused": "refused everywhere", "not run": "not run"}
MEASURED = {kind: kind for kind in ("measured", "in memory only", "refused", "not run")}
PAGES = {
    "architectures": Page("architectures", "sweep", _cut, CUT, _kind_of_cut),
    "measured": Page("measured", "measuring", _measured, MEASURED, _kind_of_measured),
}


def main(arguments: list[str]) -> int:
    """Write one of the pages."""
    page = PAGES.get(arguments[0] if arguments else "")
    if page is None:
        print(f"usage: python docs/outcomes.py {'|'.join(PAGES)} [TASK:TYPE ...]", file=sys.stderr)
        return 2
    return page.write(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
